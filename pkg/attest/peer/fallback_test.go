package peer

import (
	"net"
	"os"
	"os/exec"
	"testing"
	"time"
)

// On an old kernel, a process that is older than its connection is accepted, and
// says that it is not proven by the kernel.
func TestV_D1_Fallback(t *testing.T) {
	l, path := listen(t, Options{noPeerPIDFD: true})
	dial(t, path)
	_, p := accept(t, l)
	if p.PID != os.Getpid() || p.proven {
		t.Errorf("peer %d, proven %v", p.PID, p.proven)
	}
	// A young one gets in sooner or later.
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte("x"))
			_ = c.Close()
		}
	}()
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestFallbackYoung$")
	cmd.Env = append(os.Environ(), "PEER_TEST_YOUNG="+path)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// TestFallbackYoung is the young process of TestV_D1_Fallback.
func TestFallbackYoung(t *testing.T) {
	path := os.Getenv("PEER_TEST_YOUNG")
	if path == "" {
		t.Skip("runs within TestV_D1_Fallback")
	}
	within(t, "accepted", func() bool {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		n, _ := c.Read(make([]byte, 1))
		return n == 1
	})
}

func TestCheckStart(t *testing.T) {
	for _, tc := range []struct {
		start uint64
		since time.Duration
		ok    bool
	}{
		{0, 0, false}, // the queue was never seen empty
		{5, 0, false}, //
		{99, time.Second, true},
		{100, time.Second, false}, // in the tick of since
		{99, time.Second - 1, false},
		{101, time.Second, false},
	} {
		if err := checkStart(tc.start, tc.since); (err == nil) != tc.ok {
			t.Errorf("start %d, since %s: %v", tc.start, tc.since, err)
		}
	}
}
