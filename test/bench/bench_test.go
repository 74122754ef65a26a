// Package bench measures what is promised, on the real programs: processor time
// of a program, memory of a program, and how long somebody waits. What depends on
// the machine is reported beside what it is compared with, measured in the same
// run; nothing is asserted. docs/performance.md says what each figure should be.
package bench

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshid/meshid/pkg/agent"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

func TestMain(m *testing.M) {
	code := local.Main(m)
	if dir, err := buildClient(); err == nil {
		_ = os.RemoveAll(dir)
	}
	os.Exit(code) //nolint:forbidigo // TestMain is this package's main
}

// buildClient builds the program in client/, once, into a folder that every user
// may read.
var buildClient = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "meshid-bench")
	if err != nil {
		return "", err
	}
	if err := os.Chmod(dir, 0o755); err != nil { // see above
		return "", err
	}
	cmd := exec.Command("go", "build", "-o", dir+"/", "./test/bench/client")
	cmd.Dir = require.Repository()
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the client: %w\n%s", err, out)
	}
	return dir, nil
})

// must ends the benchmark on an error.
func must(b testing.TB, err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

// only says that the benchmark has metrics of its own and that the time of an
// iteration means nothing.
func only(b *testing.B) { b.ReportMetric(0, "ns/op") }

// processorTime returns the processor time that a process has used, all of its
// threads and system calls, to the nanosecond: its clock can be read like any.
func processorTime(b testing.TB, pid int) time.Duration {
	b.Helper()
	var t unix.Timespec
	must(b, unix.ClockGettime(int32(^pid<<3|2), &t)) // CPUCLOCK_SCHED of the process, clock_getcpuclockid(3)
	return time.Duration(t.Nano())
}

// threadTime returns the processor time of this thread; the goroutine is locked
// to it.
func threadTime(b testing.TB) time.Duration {
	b.Helper()
	var t unix.Timespec
	must(b, unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t))
	return time.Duration(t.Nano())
}

// resident returns the memory of a process, in bytes: all, and the part that is
// its own rather than pages of its file.
func resident(b testing.TB, pid int) (all, own float64) {
	b.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	must(b, err)
	for line := range strings.Lines(string(text)) {
		key, value, _ := strings.Cut(line, ":")
		f := strings.Fields(value)
		switch key {
		case "VmRSS", "RssAnon":
			kib, err := strconv.ParseFloat(f[0], 64)
			must(b, err)
			if key == "VmRSS" {
				all = kib * 1024
			} else {
				own = kib * 1024
			}
		default:
		}
	}
	return all, own
}

// metric returns the value of a metric without labels.
func metric(b testing.TB, address, name string) float64 {
	b.Helper()
	response, err := http.Get("http://" + address + "/metrics") // ours, on loopback
	must(b, err)
	defer response.Body.Close() // it was read
	lines := bufio.NewScanner(response.Body)
	for lines.Scan() {
		if v, ok := strings.CutPrefix(lines.Text(), name+" "); ok {
			n, err := strconv.ParseFloat(v, 64)
			must(b, err)
			return n
		}
	}
	b.Fatalf("no %s in the metrics", name)
	return 0
}

// goroutines returns how many goroutines a program has, from its metrics.
func goroutines(b testing.TB, address string) float64 {
	b.Helper()
	return metric(b, address, "go_goroutines")
}

// pause lets a program run by itself for a time: what it does meanwhile is what
// is measured.
func pause(b testing.TB, d time.Duration) {
	b.Helper()
	select {
	case <-time.After(d):
	case <-b.Context().Done():
		b.Fatal(b.Context().Err())
	}
}

// status asks an agent how it is, without the cost of a program for it.
func status(b testing.TB, a *local.Agent) *agent.Status {
	b.Helper()
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", a.AdminSocket)
	}}}
	response, err := c.Get("http://agent/status") // bounded by the test's own time
	must(b, err)
	defer response.Body.Close() // it was read
	s := &agent.Status{}
	must(b, json.NewDecoder(response.Body).Decode(s))
	return s
}

// awaitStatus waits until an agent's status is as ok wants it.
func awaitStatus(b testing.TB, a *local.Agent, what string, ok func(*agent.Status) bool) {
	b.Helper()
	local.Await(b, "wait for "+what, func(context.Context) error {
		if s := status(b, a); !ok(s) {
			return fmt.Errorf("%d streams, %d instances, %d entries", s.Streams, len(s.Instances), s.Entries)
		}
		return nil
	})
}

// quantiles reports the middle and the 99th percentile of what somebody waited.
func quantiles(b *testing.B, waits []time.Duration) {
	b.Helper()
	slices.Sort(waits)
	at := func(q float64) float64 {
		return float64(waits[min(int(q*float64(len(waits))), len(waits)-1)].Microseconds()) / 1000
	}
	b.ReportMetric(at(0.5), "p50-ms")
	b.ReportMetric(at(0.99), "p99-ms")
	only(b)
}

// pair starts a CA, an agent and, on both, an entry for every user.
func pair(b *testing.B) (*local.CA, *local.Agent) {
	b.Helper()
	require.Root(b)
	ca := local.StartCA(b, local.CAOptions{})
	apply(b, ca, everybody)
	a := ca.StartAgent(b, "bench", local.AgentOptions{})
	dir, err := buildClient()
	must(b, err)
	st, err := os.Stat(dir)
	must(b, err)
	// The hash of a file that has just been written is not kept.
	pause(b, max(0, time.Until(st.ModTime().Add(5*time.Second))))
	awaitStatus(b, a, "the entry", func(s *agent.Status) bool { return s.Entries == 1 })
	return ca, a
}

// firstUser is the first of the users that processes run as: each is a workload
// instance of its own.
const firstUser = 300_000

var everybody = &entryv1.Entry{
	Name: "everybody", SpiffeId: "spiffe://example.org/user/{string(unix.uid)}",
	Workloads: fmt.Sprintf("unix.uid >= %d", firstUser), AcceptWeak: true,
}

func apply(b testing.TB, ca *local.CA, entries ...*entryv1.Entry) {
	b.Helper()
	_, err := ca.Admin.ApplyEntries(b.Context(), &adminv1.ApplyEntriesRequest{Entries: entries})
	must(b, err)
}

func remove(b testing.TB, ca *local.CA, names ...string) {
	b.Helper()
	_, err := ca.Admin.DeleteEntries(b.Context(), &adminv1.DeleteEntriesRequest{Names: names})
	must(b, err)
}

// crowd are processes that wait at a gate, and then all want a secret.
type crowd struct {
	processes []*exec.Cmd
	gate      *os.File
	lines     *bufio.Scanner
	out       *os.File
}

// envoyNode is how large the node is that Envoy 1.40 sends with its first request.
const envoyNode = 60 << 10

// gather starts n processes as the users from user on (step 0: all as the same)
// and waits until they stand at the gate.
func gather(b testing.TB, socket string, n, user, step, nodeBytes int) *crowd {
	b.Helper()
	dir, err := buildClient()
	must(b, err)
	gateIn, gate, err := os.Pipe()
	must(b, err)
	out, outIn, err := os.Pipe()
	must(b, err)
	c := &crowd{gate: gate, out: out, lines: bufio.NewScanner(out)}
	for i := range n {
		cmd := exec.Command(filepath.Join(dir, "client"), socket, "default", strconv.Itoa(nodeBytes))
		cmd.Stdin, cmd.Stdout, cmd.Stderr = gateIn, outIn, os.Stderr
		id := uint32(user + i*step) // some hundred thousand
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: id, Gid: id}, Pdeathsig: syscall.SIGKILL}
		cmd.Env = []string{"GOMAXPROCS=1", "GOGC=off"}
		must(b, cmd.Start())
		c.processes = append(c.processes, cmd)
	}
	must(b, gateIn.Close())
	must(b, outIn.Close())
	for range n {
		if !c.lines.Scan() {
			b.Fatal("a client ended before it was ready")
		}
	}
	return c
}

// release opens the gate and returns, once all have their secret, how long each
// waited, and how long it took from the first that began to the last that had it.
func (c *crowd) release(b testing.TB) (waits []time.Duration, all time.Duration) {
	b.Helper()
	must(b, c.gate.Close())
	var first, last int64
	for range c.processes {
		if !c.lines.Scan() {
			b.Fatal("a client ended without a secret")
		}
		var begin, end int64
		if _, err := fmt.Sscanf(c.lines.Text(), "secret %d %d", &begin, &end); err != nil {
			b.Fatalf("%q: %v", c.lines.Text(), err)
		}
		waits = append(waits, time.Duration(end-begin))
		if first == 0 || begin < first {
			first = begin
		}
		last = max(last, end)
	}
	return waits, time.Duration(last - first)
}

// processorTime is what the processes have used.
func (c *crowd) processorTime(b testing.TB) (all time.Duration) {
	b.Helper()
	for _, p := range c.processes {
		all += processorTime(b, p.Process.Pid)
	}
	return all
}

// leave ends the processes.
func (c *crowd) leave() {
	for _, p := range c.processes {
		_ = p.Process.Kill()
	}
	for _, p := range c.processes {
		_ = p.Wait() // killed
	}
	_ = c.out.Close()
}
