package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// maxNames bounds a list of names, in bytes.
const maxNames = 16 << 20

// nameList is a list that is given as arguments, in a file, or both.
type nameList struct{ file string }

func (l *nameList) add(cmd *cobra.Command, what string) {
	cmd.Flags().StringVarP(&l.file, "file", "f", "", what+", one a line, in this file, or on standard input for -; what is after a # is left out")
	_ = cmd.MarkFlagFilename("file") // the flag is there
}

// all returns the arguments and what the file has.
func (l *nameList) all(cmd *cobra.Command, args []string) ([]string, error) {
	if l.file == "" {
		return args, nil
	}
	from := cmd.InOrStdin()
	if l.file != "-" {
		f, err := os.Open(l.file)
		if err != nil {
			return nil, fmt.Errorf("--file: %w", err)
		}
		defer f.Close() //nolint:errcheck // only read from
		from = f
	}
	data, err := io.ReadAll(io.LimitReader(from, maxNames+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("--file %s: %w", l.file, err)
	case len(data) > maxNames:
		return nil, fmt.Errorf("--file %s: larger than %d bytes", l.file, maxNames)
	}
	for line := range strings.Lines(string(data)) {
		name, _, _ := strings.Cut(line, "#")
		if name = strings.TrimSpace(name); name != "" {
			args = append(args, name)
		}
	}
	if len(args) == 0 {
		return nil, fmt.Errorf("--file %s: there is nothing in it", l.file)
	}
	return args, nil
}

// bounded gives a call about n things its time.
func bounded(ctx context.Context, n int) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, callTimeout+time.Duration(n)*10*time.Millisecond)
}

// none is the error for a list that was not given.
func (l *nameList) none(what string) error {
	return errors.New("write " + what + ", or --file with a list of them")
}
