package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"

	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/identity"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	"github.com/meshid/meshid/test/identitytest"
)

// fakeNode is the agent's half of the fake node attestation.
type fakeNode struct{}

func (fakeNode) Method() string { return "join_token" }

func (fakeNode) Evidence(context.Context, []byte) ([]byte, error) {
	return []byte("canary-evidence"), nil
}

func (fakeNode) Respond(_ context.Context, _, challenge []byte) ([]byte, error) {
	return []byte("me: " + string(challenge)), nil
}

// fakeWorkloads attests the processes that it was told of.
type fakeWorkloads struct {
	mu     sync.Mutex // guards what follows
	facts  map[int]*attest.Facts
	errs   map[int]error
	calls  int
	events chan attest.InstanceEvent
}

func newFakeWorkloads() *fakeWorkloads {
	return &fakeWorkloads{
		facts: make(map[int]*attest.Facts), errs: make(map[int]error), events: make(chan attest.InstanceEvent),
	}
}

func (w *fakeWorkloads) Name() string { return "fake" }

func (w *fakeWorkloads) Attest(_ context.Context, p *peer.Peer) (*attest.Facts, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.calls++
	if err := w.errs[p.PID]; err != nil {
		return nil, err
	}
	if f := w.facts[p.PID]; f != nil {
		return f, nil
	}
	return &attest.Facts{
		Workload: &attributesv1.Workload{Unix: &attributesv1.Unix{Uid: int64(p.UID), Gid: int64(p.GID), Path: "/bin/app"}},
		Instance: fmt.Sprintf("unix:%d:%d:/bin/app", p.UID, p.GID), Rank: attest.RankProcess,
	}, nil
}

// Watch implements attest.InstanceWatcher.
func (w *fakeWorkloads) Watch(ctx context.Context, event func(attest.InstanceEvent)) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case e := <-w.events:
			event(e)
		}
	}
}

// container says that a process runs in a container with this label.
func (w *fakeWorkloads) container(pid int, name, app string) *attributesv1.Workload {
	w.mu.Lock()
	defer w.mu.Unlock()
	d := &attributesv1.Docker{
		ContainerId: name, Image: "registry.internal/" + app, ImageDigest: "sha256:" + strings.Repeat("a", 64),
		Labels: map[string]string{"app": app},
	}
	if pid > 0 {
		w.facts[pid] = &attest.Facts{
			Workload: &attributesv1.Workload{Docker: d}, Instance: "docker:" + name, Rank: attest.RankContainer,
		}
	}
	return &attributesv1.Workload{Docker: d}
}

// discard logs nothing.
var discard = slog.New(slog.DiscardHandler)

// harness is an agent with its CA.
type harness struct {
	*Agent
	t         testing.TB
	ca        *fakeCA
	workloads *fakeWorkloads
	health    *health.Tracker
	registry  *prometheus.Registry
	config    Config
	cancel    context.CancelFunc
	ran       chan error
	log       *identitytest.Log
}

// newHarness makes an agent that has not started.
func newHarness(t testing.TB, ca *fakeCA, dir string, change ...func(*Config)) *harness {
	t.Helper()
	h := &harness{t: t, ca: ca, workloads: newFakeWorkloads(), registry: prometheus.NewRegistry(), log: &identitytest.Log{}}
	var err error
	if h.health, err = health.New(h.registry, "meshid_agent", Conditions...); err != nil {
		t.Fatal(err)
	}
	h.config = Config{
		TrustDomain: testTD, CAAddress: "passthrough:///ca", TrustAnchors: []*x509.Certificate{ca.root.cert},
		Node: fakeNode{}, Workloads: []attest.WorkloadAttestor{h.workloads}, DataDir: dir, Version: "test",
		SealingKeyFile: "none", Logger: slog.New(slog.NewTextHandler(io.MultiWriter(h.log, t.Output()), &slog.HandlerOptions{Level: slog.LevelDebug})),
		Registerer: h.registry, Health: h.health,
		DialOptions: []grpc.DialOption{grpc.WithContextDialer(ca.dial)},
	}
	for _, c := range change {
		c(&h.config)
	}
	if h.Agent, err = New(h.config); err != nil {
		t.Fatal(err)
	}
	return h
}

func (h *harness) start() {
	ctx, cancel := context.WithCancel(context.Background())
	h.cancel, h.ran = cancel, make(chan error, 1)
	go func() { h.ran <- h.Run(ctx) }()
}

func (h *harness) stop() {
	h.t.Helper()
	h.cancel()
	if err := <-h.ran; err != nil {
		h.t.Errorf("Run = %v", err)
	}
}

// pass lets time pass in a bubble.
func pass(d time.Duration) { time.Sleep(d) }

// bubble runs a test with a CA and a started agent in fake time, and checks that
// no goroutine stays behind: synctest fails if one does.
func bubble(t *testing.T, test func(t *testing.T, h *harness), change ...func(*Config)) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "agent")
	synctest.Test(t, func(t *testing.T) {
		ca := newFakeCA(t)
		defer ca.close()
		h := newHarness(t, ca, dir, change...)
		h.start()
		defer h.stop()
		synctest.Wait()
		test(t, h)
	})
}

// subscribe opens a stream of a process.
func (h *harness) subscribe(pid int, uid uint32) *identity.Watch {
	h.t.Helper()
	w, err := h.Subscribe(context.Background(), peer.ForTest(pid, uid, uid))
	if err != nil {
		h.t.Fatal(err)
	}
	return w
}

// settleDown lets everything happen that can happen now.
func settleDown() {
	synctest.Wait()
	runtime.Gosched()
	synctest.Wait()
}

// ids returns the SPIFFE IDs of a snapshot.
func ids(s *identity.Snapshot) []string {
	out := []string{}
	if s == nil {
		return nil
	}
	for _, svid := range s.SVIDs {
		out = append(out, svid.ID.Path())
	}
	return out
}

func withdrawn(s *identity.Snapshot) []string {
	out := []string{}
	for _, id := range s.Withdrawn {
		out = append(out, id.Path())
	}
	return out
}

// mustHave fails unless the watch has SVIDs with these paths.
func mustHave(t testing.TB, w *identity.Watch, paths ...string) *identity.Snapshot {
	t.Helper()
	s := w.Snapshot()
	if got := ids(s); !slices.Equal(got, paths) {
		t.Fatalf("identities = %q (snapshot %+v), want %q", got, s, paths)
	}
	now := time.Now()
	for _, svid := range s.SVIDs {
		if !svid.NotAfter().After(now) {
			t.Fatalf("an expired X.509-SVID is served: %v", svid.NotAfter())
		}
		if !svid.Key.Public().(*ecdsa.PublicKey).Equal(identitytest.X509(svid.Chain[0]).PublicKey) {
			t.Fatal("key and certificate are not of one pair")
		}
	}
	return s
}

// condition returns the state of a health condition.
func (h *harness) condition(name string) health.Condition {
	for _, c := range h.health.Conditions() {
		if c.Name == name {
			return c
		}
	}
	h.t.Fatalf("no condition %q", name)
	return health.Condition{}
}

func entry(name, path, workloads string) *entryv1.Entry {
	return &entryv1.Entry{Name: name, SpiffeId: "spiffe://example.org" + path, Workloads: workloads}
}

func uidEntry(name, path string, uid int) *entryv1.Entry {
	return entry(name, path, fmt.Sprintf("unix.uid == %d", uid))
}

// sealing returns a folder for an agent's data, and has its cache sealed by the key in the
// file "seal" beside it.
func sealing(t *testing.T) (data string, with func(*Config)) {
	t.Helper()
	dir := t.TempDir()
	seal := filepath.Join(dir, "seal")
	if err := os.WriteFile(seal, []byte(strings.Repeat("s", 32)), 0o600); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "agent"), func(c *Config) { c.SealingKeyFile = seal }
}
