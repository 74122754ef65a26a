package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/identity"
)

// TestFault_F41_TwoAgents: the second one refuses and names the first.
func TestFault_F41_TwoAgents(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "agent")
	synctest.Test(t, func(t *testing.T) {
		ca := newFakeCA(t)
		defer ca.close()
		h := newHarness(t, ca, dir)
		h.start()
		settleDown()
		second := newHarness(t, ca, dir)
		err := second.Run(t.Context())
		if err == nil || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) {
			t.Errorf("Run = %v, want an error with the process id %d", err, os.Getpid())
		}
		h.stop()
	})
}

func TestBounds(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		h.subscribe(1, 1)
		w := h.subscribe(2, 2)
		if _, err := h.Subscribe(t.Context(), peer.ForTest(3, 3, 3)); !errors.Is(err, ErrTooManyStreams) {
			t.Errorf("third stream: %v", err)
		}
		w.Close()
		h.subscribe(3, 3)
	}, func(c *Config) { c.MaxStreams = 2 })
}

// TestV_I6_NoGoroutineStays: an open stream costs none, and none is left behind
// by streams that end at any point.
func TestV_I6_NoGoroutineStays(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		h.ca.apply(uidEntry("web", "/web", 1000))
		w := h.subscribe(1, 1000)
		settleDown()
		mustHave(t, w, "/web")
		base := runtime.NumGoroutine()
		var watches []*identity.Watch
		for n := range 500 {
			watches = append(watches, h.subscribe(n+2, 1000))
		}
		settleDown()
		if n := runtime.NumGoroutine(); n > base+5 { // others' tests may have some
			t.Errorf("500 open streams cost %d goroutines", n-base)
		}
		for _, w := range watches {
			w.Close()
		}
		h.workloads.mu.Lock()
		for n := range 500 {
			h.workloads.errs[n] = errors.New("not now")
		}
		h.workloads.mu.Unlock()
		for n := range 500 {
			ctx, cancel := context.WithCancel(t.Context())
			w, err := h.Subscribe(ctx, peer.ForTest(n, 1000, 1000))
			if err != nil {
				t.Fatal(err)
			}
			switch n % 3 {
			case 0:
				cancel()
				w.Close()
			case 1:
				w.Close()
				cancel()
			default:
				settleDown()
				cancel()
				w.Close()
			}
		}
		settleDown()
		if n := runtime.NumGoroutine(); n > base+5 { // others' tests may have some
			buffer := make([]byte, 1<<20)
			t.Errorf("%d goroutines are left:\n%s", n-base, buffer[:runtime.Stack(buffer, true)])
		}
	})
}

// TestV_J4_NoSecretsShown: neither the log nor the status holds a key, a token
// or a CSR.
func TestV_J4_NoSecretsShown(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		h.ca.apply(uidEntry("web", "/web", 1000))
		w := h.subscribe(1, 1000)
		settleDown()
		mustHave(t, w, "/web")
		time.Sleep(time.Hour)
		h.ca.net.set(true)
		time.Sleep(70 * time.Minute)
		settleDown()
		st, err := json.Marshal(h.Status())
		if err != nil {
			t.Fatal(err)
		}
		everything := h.log.String() + string(st)
		for _, bad := range []string{"PRIVATE", "canary-evidence", "me: who", "\\x30"} {
			if strings.Contains(everything, bad) {
				t.Errorf("%q is shown:\n%s", bad, everything)
			}
		}
		if long := regexp.MustCompile(`[0-9a-zA-Z+/]{80,}`).FindString(everything); long != "" {
			t.Errorf("something that looks like a key is shown: %s", long)
		}
	})
}

func TestStatus(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		h.ca.apply(uidEntry("web", "/web", 1000))
		h.subscribe(1, 1000)
		settleDown()
		st := h.Status()
		if st.NodeID != "spiffe://example.org/meshid/node/join_token/n1" || !st.Connected || st.Revision != 2 ||
			st.Streams != 1 || st.Entries != 1 || st.BundleSequence != 1 || len(st.Conditions) != len(Conditions) {
			t.Errorf("status %+v", st)
		}
		i := st.Instances[0]
		if i.Instance != "unix:1000:1000:/bin/app" || i.Streams != 1 || i.Identities[0].State != "ok" ||
			i.Identities[0].SPIFFEID != "spiffe://example.org/web" || i.Identities[0].Serial == "" {
			t.Errorf("instance %+v", i)
		}
		if _, err := h.registry.Gather(); err != nil {
			t.Error(err)
		}
	})
}

func TestNewChecksItsConfig(t *testing.T) {
	ca := newFakeCA(t)
	defer ca.close()
	for name, change := range map[string]func(*Config){
		"no trust domain":      func(c *Config) { c.TrustDomain = spiffeid.TrustDomain{} },
		"no address":           func(c *Config) { c.CAAddress = "" },
		"no anchors, no pin":   func(c *Config) { c.TrustAnchors = nil }, // T6
		"short pin":            func(c *Config) { c.RootSHA256 = []byte{1} },
		"no node attester":     func(c *Config) { c.Node = nil },
		"no workload attestor": func(c *Config) { c.Workloads = nil },
		"no data directory":    func(c *Config) { c.DataDir = "" },
		"leaf as anchor":       func(c *Config) { c.TrustAnchors[0] = ca.intermediate.cert },
	} {
		h := newHarness(t, ca, t.TempDir())
		c := h.config
		c.Registerer, c.TrustAnchors = prometheus.NewRegistry(), slices.Clone(c.TrustAnchors)
		change(&c)
		if _, err := New(c); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
