// Package conformance holds the real programs, as processes, against the
// requirements of the SPIFFE specifications: names, certificates, the workload
// endpoint and the Workload API, and against what has gone wrong with them in
// this field. It looks from outside only: as a workload (with go-spiffe and
// without), as a proxy, and as an agent that lies. What one part does by itself
// is that part's tests.
package conformance

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"

	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

func TestMain(m *testing.M) {
	if os.Getenv(callerEnv) != "" {
		os.Exit(callerMain()) //nolint:forbidigo // this is not a test, but a process that a test started
	}
	code := local.Main(m)
	stop()
	os.Exit(code) //nolint:forbidigo // TestMain is this package's main
}

// td is the trust domain of all CAs here that do not say otherwise.
const td = local.TrustDomain

// denySoon has an agent tell a caller without an identity so at once, and not hold
// it for half a minute.
const denySoon = "workload_api: {deny_after: 10ms}\n"

// world is a CA with one node agent.
type world struct {
	ca    *local.CA
	agent *local.Agent
}

// common is the world that tests share which do no harm to it. stop ends it.
var common struct {
	once   sync.Once
	keeper *keeper
	world  world
	tell   sync.Map // names of tests that tell what its programs said
}

func stop() {
	if common.keeper != nil {
		common.keeper.end()
	}
}

// shared returns the common world.
func shared(t *testing.T) *world {
	t.Helper()
	require.Root(t)
	common.once.Do(func() {
		common.keeper = newKeeper()
		common.keeper.try(func() {
			common.world.ca = local.StartCA(common.keeper, local.CAOptions{})
			common.world.agent = common.world.ca.StartAgent(common.keeper, "shared", local.AgentOptions{Config: denySoon})
		})
	})
	if err := common.keeper.failed(); err != nil {
		t.Fatal(err)
	}
	if _, told := common.tell.LoadOrStore(t.Name(), true); told {
		return &common.world
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the CA says:\n%s\nthe agent says:\n%s", tail(common.world.ca.Log()), tail(common.world.agent.Log()))
		}
	})
	return &common.world
}

// alone returns a world of the test's own, which runs in parallel with others.
func alone(t *testing.T, o local.CAOptions) *world {
	t.Helper()
	require.Root(t)
	w := &world{ca: local.StartCA(t, o)}
	w.agent = w.ca.StartAgent(t, "alone", local.AgentOptions{Config: denySoon})
	return w
}

func tail(s string) string {
	const most = 3000
	if len(s) > most {
		return "…" + s[len(s)-most:]
	}
	return s
}

// keeper takes the place of a test for what all tests share: what is to be
// cleaned up is, when all have ended.
type keeper struct {
	testing.TB // nil: package local needs only what is here

	ctx    context.Context //nolint:containedctx // TB has one
	cancel context.CancelFunc

	mu       sync.Mutex // guards what follows
	cleanups []func()
	err      error
}

func newKeeper() *keeper {
	k := &keeper{}
	k.ctx, k.cancel = context.WithCancel(context.Background())
	return k
}

// try runs f, which Fatal ends.
func (k *keeper) try(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	<-done
}

func (k *keeper) failed() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.err
}

func (k *keeper) end() {
	k.cancel()
	for _, f := range slices.Backward(k.cleanups) {
		f()
	}
}

func (k *keeper) Helper()                  {}
func (k *keeper) Logf(string, ...any)      {}
func (k *keeper) Failed() bool             { return false }
func (k *keeper) Context() context.Context { return k.ctx }

func (k *keeper) Cleanup(f func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.cleanups = append(k.cleanups, f)
}

func (k *keeper) Fatal(args ...any) { k.Fatalf("%s", fmt.Sprint(args...)) }

func (k *keeper) Fatalf(format string, args ...any) {
	k.mu.Lock()
	k.err = fmt.Errorf(format, args...)
	k.mu.Unlock()
	runtime.Goexit()
}

// users hands each test users of its own: identities are told apart by them.
var users atomic.Uint32

func newUser() uint32 { return 61_000 + users.Add(1) }

// entry returns a registration entry that gives a user one identity.
func entry(name string, uid uint32) *entryv1.Entry {
	return &entryv1.Entry{
		Name: name, SpiffeId: "spiffe://" + td + "/" + name,
		Workloads: fmt.Sprintf("unix.uid == %d", uid), Ttl: durationpb.New(time.Hour),
	}
}

// apply applies entries; the test's end deletes them.
func (w *world) apply(t *testing.T, entries ...*entryv1.Entry) {
	t.Helper()
	if err := w.tryApply(t, entries...); err != nil {
		t.Fatal(err)
	}
}

func (w *world) tryApply(t *testing.T, entries ...*entryv1.Entry) error {
	t.Helper()
	if _, err := w.ca.Admin.ApplyEntries(t.Context(), &adminv1.ApplyEntriesRequest{Entries: entries}); err != nil {
		return err
	}
	t.Cleanup(func() {
		for _, e := range entries {
			// It may be deleted already, or the CA be gone.
			_, _ = w.ca.Admin.DeleteEntries(context.Background(), &adminv1.DeleteEntriesRequest{Names: []string{e.GetName()}})
		}
	})
	return nil
}

func (w *world) remove(t *testing.T, names ...string) {
	t.Helper()
	if _, err := w.ca.Admin.DeleteEntries(t.Context(), &adminv1.DeleteEntriesRequest{Names: names}); err != nil {
		t.Fatal(err)
	}
}

// rotate has the agents renew everything.
func (w *world) rotate(t *testing.T) {
	t.Helper()
	if _, err := w.ca.Admin.RenewSVIDs(t.Context(), &adminv1.RenewSVIDsRequest{}); err != nil {
		t.Fatal(err)
	}
}

// settled waits until all connected agents have applied all that was decided.
func (w *world) settled(t *testing.T) {
	t.Helper()
	local.Await(t, "entries in force", func(ctx context.Context) error {
		s, err := w.ca.Admin.EntryStatus(ctx, &adminv1.EntryStatusRequest{})
		if err == nil && (s.GetNodesConnected() == 0 || s.GetNodesInForce() != s.GetNodesConnected()) {
			err = fmt.Errorf("on %d of %d nodes", s.GetNodesInForce(), s.GetNodesConnected())
		}
		return err
	})
}

// metric returns the sum of a metric's series that have all of the labels, such
// as `method="unix"`.
func metric(ctx context.Context, address, name string, labels ...string) (float64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/metrics", http.NoBody)
	if err != nil {
		return 0, err
	}
	text, err := get(http.DefaultClient, req)
	if err != nil {
		return 0, err
	}
	sum, found := 0.0, false
	for line := range strings.Lines(text) {
		series, value, ok := strings.Cut(strings.TrimSpace(line), "} ")
		if !ok {
			series, value, ok = strings.Cut(strings.TrimSpace(line), " ")
		}
		if base, _, _ := strings.Cut(series, "{"); !ok || base != name {
			continue
		}
		for _, l := range labels {
			ok = ok && strings.Contains(series, l)
		}
		var v float64
		if _, err := fmt.Sscan(value, &v); ok && err == nil {
			sum, found = sum+v, true
		}
	}
	if !found {
		return 0, errors.New("no metric " + name)
	}
	return sum, nil
}
