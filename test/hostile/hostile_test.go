// Package hostile attacks the real programs, as processes: with connections that
// say nothing or too much, with files that others can read, with too little
// space and too few descriptors. It answers "do they hold, and are the others
// served meanwhile". It looks at them from outside only: sockets, files, /proc,
// logs and metrics.
package hostile

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

// TestMain runs the tests, or is one of the processes that they start as other
// users: see children.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "as" {
		os.Exit(child(os.Args[2], os.Args[3:])) //nolint:forbidigo // this process is no test
	}
	flag.Parse()
	if set := flag.Lookup("test.parallel"); set.Value.String() == strconv.Itoa(runtime.GOMAXPROCS(0)) {
		_ = set.Value.Set(strconv.Itoa(max(4, runtime.GOMAXPROCS(0)))) // most of them wait for a deadline
	}
	code := local.Main(m)
	if dir := programs.dir; dir != "" {
		_ = os.RemoveAll(dir) // a leftover in the temporary folder harms nobody
	}
	os.Exit(code) //nolint:forbidigo // TestMain is this package's main
}

// children are the processes that tests start as other users.
var children = map[string]func(args []string) error{
	"fetch": fetchChild,
	"hoard": hoardChild,
	"relay": relayChild,
	"claim": claimChild,
}

func child(name string, args []string) int {
	run, ok := children[name]
	if !ok {
		fmt.Fprintln(os.Stderr, "no such child:", name)
		return 2
	}
	if err := run(args); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// programs are copies of programs that other users may run.
var programs struct {
	mu  sync.Mutex // guards what follows
	dir string
}

// forAll copies a program to where all users may run it, once.
func forAll(t testing.TB, name, from string) string {
	t.Helper()
	programs.mu.Lock()
	defer programs.mu.Unlock()
	if programs.dir == "" {
		dir, err := os.MkdirTemp("", "meshid-hostile") //nolint:usetesting // it is for all tests
		must(t, err)
		must(t, os.Chmod(dir, 0o755))
		programs.dir = dir
	}
	path := filepath.Join(programs.dir, name)
	if _, err := os.Stat(path); err == nil {
		return path
	}
	in, err := os.Open(from)
	must(t, err)
	defer in.Close()
	// A process that another test forks meanwhile would hold the file open for
	// writing until its exec, and "text file busy" is what its first user gets.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	out, err := os.OpenFile(path+".new", os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o755)
	must(t, err)
	_, err = io.Copy(out, in)
	must(t, errors.Join(err, out.Chmod(0o755), out.Close()))
	must(t, os.Rename(path+".new", path))
	return path
}

// as returns a command that runs one of the children as a user.
func as(t testing.TB, uid uint32, name string, args ...string) *exec.Cmd {
	t.Helper()
	return user(t, uid, forAll(t, "child", "/proc/self/exe"), append([]string{"as", name}, args...)...)
}

// user returns a command that runs a program as a user.
func user(t testing.TB, uid uint32, path string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), path, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid, NoSetGroups: true}}
	cmd.Env, cmd.Dir = []string{}, "/"
	return cmd
}

// output runs a command and returns what it printed.
func output(t testing.TB, cmd *exec.Cmd) string {
	t.Helper()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %v: %s", cmd.Args, err, stderr.String())
	}
	return strings.TrimSpace(string(out))
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Users of these tests; nobody on a machine has such numbers.
const (
	alice uint32 = 23001
	bob   uint32 = 23002
	// mallory has no entry in most tests.
	mallory uint32 = 23003
)

// entries give alice and bob, and root, an identity.
const entries = `
- {name: alice, spiffe_id: 'spiffe://example.org/alice', workloads: unix.uid == 23001}
- {name: bob, spiffe_id: 'spiffe://example.org/bob', workloads: unix.uid == 23002}
- {name: root, spiffe_id: 'spiffe://example.org/root', workloads: unix.uid == 0}
`

// world is a CA and a node agent that are attacked.
type world struct {
	ca    *local.CA
	agent *local.Agent
}

// newWorld starts both, with entries.
func newWorld(t *testing.T) *world {
	t.Helper()
	require.Root(t)
	w := &world{ca: local.StartCA(t, local.CAOptions{})}
	w.ca.Apply(t, entries)
	w.agent = w.ca.StartAgent(t, "web-1", local.AgentOptions{Config: "workload_api: {deny_after: 1s}\n"})
	return w
}

// sound fails the test if one of the programs has ended or panicked.
func (w *world) sound(t *testing.T) {
	t.Helper()
	for name, p := range map[string]*local.Process{"the CA": w.ca.Process, "the agent": w.agent.Process} {
		select {
		case <-p.Done():
			t.Errorf("%s has ended", name)
		default:
		}
		if log := p.Log(); strings.Contains(log, "panic") || strings.Contains(log, "goroutine ") {
			t.Errorf("%s panicked", name)
		}
	}
}

// fetch returns the SPIFFE ID of this process, once it has one.
func fetch(t *testing.T, a *local.Agent) string {
	t.Helper()
	var id string
	local.Await(t, "fetch", func(ctx context.Context) error {
		svid, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr(a.Address()))
		if err == nil {
			id = svid.ID.String()
		}
		return err
	})
	return id
}

// patience is how long something may take that is done in milliseconds on an idle
// machine, or, where a deadline of the programs has to pass first, a little later.
const patience = time.Minute

// fetchChild prints the SPIFFE ID of this process and how long it took to get it.
func fetchChild(args []string) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	start := time.Now()
	svid, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr("unix://"+args[0]))
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(os.Stdout, svid.ID, time.Since(start).Milliseconds())
	return err
}

// fetchAs returns the SPIFFE ID that a user's process gets, and after how long.
func fetchAs(t testing.TB, uid uint32, a *local.Agent) (string, time.Duration) {
	t.Helper()
	id, ms, _ := strings.Cut(output(t, as(t, uid, "fetch", a.Socket)), " ")
	n, err := strconv.Atoi(ms)
	must(t, err)
	return id, time.Duration(n) * time.Millisecond
}

// descriptors counts the open files of a process.
func descriptors(t testing.TB, pid int) int {
	t.Helper()
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	must(t, err)
	return len(list)
}

// statusOf returns one number of /proc/PID/status; sizes are in kB there, and in
// bytes here.
func statusOf(t testing.TB, pid int, field string) int64 {
	t.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", pid))
	must(t, err)
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		rest, ok := strings.CutPrefix(lines.Text(), field+":")
		if !ok {
			continue
		}
		words := strings.Fields(rest)
		n, err := strconv.ParseInt(words[0], 10, 64)
		must(t, err)
		if len(words) > 1 && words[1] == "kB" {
			n *= 1024
		}
		return n
	}
	t.Fatalf("no %s in /proc/%d/status", field, pid)
	return 0
}

// metrics returns what a program exports: name with labels → value.
func metrics(t testing.TB, address string) map[string]float64 {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+address+"/metrics", http.NoBody)
	must(t, err)
	answer, err := http.DefaultClient.Do(req)
	must(t, err)
	defer answer.Body.Close()
	all := map[string]float64{}
	lines := bufio.NewScanner(answer.Body)
	for lines.Scan() {
		name, value, ok := strings.Cut(lines.Text(), "} ")
		if ok {
			name += "}"
		} else if name, value, ok = strings.Cut(lines.Text(), " "); !ok {
			continue
		}
		if strings.HasPrefix(name, "#") {
			continue
		}
		if all[name], err = strconv.ParseFloat(value, 64); err != nil {
			t.Fatalf("metric %q: %v", lines.Text(), err)
		}
	}
	must(t, lines.Err())
	return all
}

// footprint is what a process holds.
type footprint struct{ descriptors, goroutines int }

func footprintOf(t testing.TB, pid int, metricsAddress string) footprint {
	t.Helper()
	http.DefaultClient.CloseIdleConnections()
	g := int(metrics(t, metricsAddress)["go_goroutines"])
	http.DefaultClient.CloseIdleConnections()
	return footprint{descriptors(t, pid), g}
}

// awaitFootprint waits until a process holds no more than before, but for what
// comes and goes by itself.
func awaitFootprint(t testing.TB, pid int, metricsAddress string, before footprint) {
	t.Helper()
	const slack = 8
	local.Await(t, "wait until everything is given back", func(context.Context) error {
		now := footprintOf(t, pid, metricsAddress)
		if now.descriptors > before.descriptors+slack || now.goroutines > before.goroutines+slack {
			return fmt.Errorf("%d descriptors and %d goroutines, before %d and %d",
				now.descriptors, now.goroutines, before.descriptors, before.goroutines)
		}
		return nil
	})
}

// wrap runs a program under a shell that first does something, as the same
// process; more are arguments that are added.
func wrap(script, more string) []string {
	return []string{"/bin/sh", "-c", script + `; exec "$@" ` + more, "sh"}
}

// files returns all files below the folders, but for those that skip names.
func files(t testing.TB, skip []string, dirs ...string) []string {
	t.Helper()
	var all []string
	for _, dir := range dirs {
		must(t, filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
			if err != nil || slices.Contains(skip, path) {
				return err
			}
			all = append(all, path)
			return nil
		}))
	}
	return all
}
