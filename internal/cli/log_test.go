package cli

import (
	"bufio"
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"
)

// A reader of the log that stops blocks nobody; what was lost meanwhile is said
// once it reads again.
func TestFault_F64_ReaderOfTheLogStops(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	log := slog.New(slog.NewTextHandler(unblock(w, textNote), nil))
	long := strings.Repeat("x", 3*logPiece)
	const lines = 2000 // many times what a pipe holds
	for n := range lines {
		log.Info("line", "n", n, "text", long[:n%len(long)])
	}
	read := bufio.NewReader(r)
	whole, next := 0, 0
	for whole == 0 || next < lines {
		log.Info("line", "n", lines) // there is room as the pipe is emptied
		line, err := read.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(line, "lines were lost") {
			if !strings.Contains(line, "count=") {
				t.Errorf("%q", line)
			}
			return
		}
		whole++
		_, _ = fmt.Sscanf(line[strings.Index(line, "n="):], "n=%d", &next)
	}
	t.Error("that lines were lost is not said")
}

func TestUnblock(t *testing.T) {
	var buf bytes.Buffer
	if got := unblock(&buf, textNote); got != &buf {
		t.Errorf("%T", got)
	}
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	line := strings.Repeat("y", 3*logPiece) + "\n"
	if n, err := unblock(f, textNote).Write([]byte(line)); n != len(line) || err != nil {
		t.Fatal(n, err)
	}
	if got, err := os.ReadFile(f.Name()); err != nil || string(got) != line {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}
