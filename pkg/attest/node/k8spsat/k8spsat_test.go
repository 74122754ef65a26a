package k8spsat

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/attesttest"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
)

// fakeTokens knows the tokens of one cluster.
type fakeTokens struct {
	audience string
	tokens   map[string]*Token
	err      error
}

func (f *fakeTokens) Verify(_ context.Context, token, audience string) (*Token, error) {
	t := f.tokens[token]
	switch {
	case f.err != nil:
		return nil, f.err
	case t == nil || audience != f.audience:
		return nil, fmt.Errorf("not the cluster's, or for another: %w", attest.ErrRefused)
	}
	return t, nil
}

// memory is Used in memory.
type memory struct {
	mu   sync.Mutex
	used map[[32]byte]time.Time
	err  error
}

func (m *memory) UseToken(_ context.Context, name [32]byte, expires, _ time.Time) (bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return false, m.err
	}
	_, used := m.used[name]
	m.used[name] = expires
	return !used, nil
}

const secret = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJ0ZXN0In0.c2lnbmF0dXJlLXRoYXQtaXMtc2VjcmV0"

func goodToken() *Token {
	return &Token{
		Namespace: "meshid", ServiceAccount: "agent", ServiceAccountUID: "sa-uid",
		PodName: "agent-x", PodUID: "pod-uid", NodeName: "node-1", NodeUID: "0a1b-node-uid",
		ID: "jti-1", ExpiresAt: time.Now().Add(10 * time.Minute),
	}
}

func goodNode() *attributesv1.Node {
	return &attributesv1.Node{
		Method: "k8s_psat", Id: "prod.0a1b-node-uid",
		K8S: &attributesv1.K8SNode{
			Cluster: "prod", Name: "node-1", Uid: "0a1b-node-uid",
			Namespace: "meshid", ServiceAccount: "agent", PodName: "agent-x", PodUid: "pod-uid",
		},
	}
}

// world is both halves and what is behind them.
type world struct {
	attester *Attester
	verifier *Verifier
	token    *Token
	tokens   *fakeTokens
	used     *memory
	file     string
}

func newWorld(t *testing.T, pods Pods) *world {
	t.Helper()
	w := &world{token: goodToken(), used: &memory{used: map[[32]byte]time.Time{}}, file: filepath.Join(t.TempDir(), "token")}
	w.tokens = &fakeTokens{audience: "meshid", tokens: map[string]*Token{secret: w.token}}
	w.write(t, secret+"\n")
	c := Config{Clusters: []ClusterConfig{
		{Name: "prod", ServiceAccounts: []string{"meshid/agent", "meshid/other"}, TokenReview: &TokenReviewConfig{}},
		{Name: "test", ServiceAccounts: []string{"meshid/agent"}, TokenReview: &TokenReviewConfig{}},
	}}
	if err := c.Check(); err != nil {
		t.Fatal(err)
	}
	w.verifier = NewVerifier([]Cluster{
		{Config: c.Clusters[0], Tokens: w.tokens, Pods: pods},
		{Config: c.Clusters[1], Tokens: &fakeTokens{audience: "meshid"}},
	}, w.used)
	a, err := NewAttester(AgentConfig{Cluster: "prod", TokenFile: w.file})
	if err != nil {
		t.Fatal(err)
	}
	w.attester = a
	return w
}

func (w *world) write(t *testing.T, text string) {
	t.Helper()
	if err := os.WriteFile(w.file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (w *world) attest(t *testing.T) (*attributesv1.Node, error) {
	t.Helper()
	evidence, err := w.attester.Evidence(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	return w.verifier.Verify(t.Context(), attest.Claim{Evidence: evidence}, nil)
}

func TestConformance(t *testing.T) {
	attesttest.Node(t, attesttest.NodeConfig{
		Pair: func(t *testing.T) (attest.NodeAttester, attest.NodeVerifier) {
			w := newWorld(t, nil)
			return w.attester, w.verifier
		},
		Once: true,
		Want: goodNode(),
	})
}

// C9: tokens that do not prove a node, whoever signed them.
func TestV_C9_Tokens(t *testing.T) {
	for name, change := range map[string]func(w *world){
		"of nobody":                  func(w *world) { w.token.Namespace, w.token.ServiceAccount = "", "" },
		"another service account":    func(w *world) { w.token.ServiceAccount = "default" },
		"the account in another one": func(w *world) { w.token.Namespace = "shop" },
		"legacy, bound to no pod":    func(w *world) { w.token.PodName, w.token.PodUID = "", "" },
		"a pod without UID":          func(w *world) { w.token.PodUID = "" },
		"no node":                    func(w *world) { w.token.NodeName, w.token.NodeUID = "", "" },
		"a node without UID":         func(w *world) { w.token.NodeUID = "" },
		"no id":                      func(w *world) { w.token.ID = "" },
		"expired":                    func(w *world) { w.token.ExpiresAt = time.Now() },
		"for too long":               func(w *world) { w.token.ExpiresAt = time.Now().Add(25 * time.Hour) },
		"another audience":           func(w *world) { w.tokens.audience = "istio-ca" },
		"of another cluster":         func(w *world) { w.attester.config.Cluster = "test" },
		"of a cluster nobody knows":  func(w *world) { w.attester.config.Cluster = "other" },
		"not the cluster's":          func(w *world) { clear(w.tokens.tokens) },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, nil)
			change(w)
			n, err := w.attest(t)
			if n != nil || !errors.Is(err, attest.ErrRefused) {
				t.Fatalf("node %v, error %v", n, err)
			}
			if strings.Contains(err.Error(), secret[len(secret)-20:]) {
				t.Errorf("the error repeats the token: %v", err)
			}
			if len(w.used.used) != 0 {
				t.Error("a token that was refused is used up")
			}
		})
	}
}

// C9: UIDs count, not names: the node and the pod of the same names that came later are
// others.
func TestV_C9_UIDNotName(t *testing.T) {
	w := newWorld(t, nil)
	first, err := w.attest(t)
	if err != nil {
		t.Fatal(err)
	}
	w.token.ID, w.token.NodeUID = "jti-2", "another-uid"
	second, err := w.attest(t)
	if err != nil {
		t.Fatal(err)
	}
	if first.GetId() == second.GetId() || first.GetK8S().GetName() != second.GetK8S().GetName() {
		t.Errorf("nodes %v and %v", first, second)
	}
}

// C9: a token is used once. That of the same id in another cluster is another's.
func TestV_C9_Once(t *testing.T) {
	w := newWorld(t, nil)
	if _, err := w.attest(t); err != nil {
		t.Fatal(err)
	}
	if _, err := w.attest(t); !errors.Is(err, attest.ErrRefused) || !strings.Contains(err.Error(), "used before") {
		t.Errorf("the second time: %v", err)
	}
	// The kubelet has replaced it.
	newer := *w.token
	newer.ID = "jti-2"
	w.tokens.tokens["a.b.newer"] = &newer
	w.write(t, "a.b.newer")
	n, err := w.attest(t)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(goodNode(), n, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	other := w.verifier.clusters["test"].Tokens.(*fakeTokens)
	other.tokens = map[string]*Token{"a.b.newer": &newer}
	w.attester.config.Cluster = "test"
	if _, err := w.attest(t); err != nil {
		t.Errorf("the same id in another cluster: %v", err)
	}
	for name, expires := range w.used.used {
		if !expires.Equal(w.token.ExpiresAt) {
			t.Errorf("token %x is remembered until %v", name, expires)
		}
	}
}

// podsFunc is Pods.
type podsFunc func(node, podUID string) error

func (f podsFunc) CheckPod(node, podUID string) error { return f(node, podUID) }

// C9: a token outlives its pod, for the cluster and for who verifies it offline. It does
// not help.
func TestV_C9_DeletedPod(t *testing.T) {
	var gone error
	w := newWorld(t, podsFunc(func(node, uid string) error {
		if node != "node-1" || uid != "pod-uid" {
			t.Errorf("asked for pod %s on node %s", uid, node)
		}
		return gone
	}))
	gone = errors.New("pod pod-uid was deleted")
	if _, err := w.attest(t); !errors.Is(err, attest.ErrRefused) || !errors.Is(err, gone) {
		t.Errorf("error %v", err)
	}
	gone = nil
	if _, err := w.attest(t); err != nil {
		t.Errorf("while it lives: %v", err)
	}
}

// What cannot be known now is no refusal, and uses nothing up.
func TestUnavailable(t *testing.T) {
	away := errors.New("away")
	for name, change := range map[string]func(w *world){
		"the cluster":  func(w *world) { w.tokens.err = away },
		"the database": func(w *world) { w.used.err = away },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, nil)
			change(w)
			if _, err := w.attest(t); !errors.Is(err, away) || errors.Is(err, attest.ErrRefused) {
				t.Errorf("error %v", err)
			}
			w.tokens.err, w.used.err = nil, nil
			if _, err := w.attest(t); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestConfig(t *testing.T) {
	good := func() ClusterConfig {
		return ClusterConfig{Name: "prod", ServiceAccounts: []string{"meshid/agent"}, TokenReview: &TokenReviewConfig{}}
	}
	for name, tc := range map[string]struct {
		change func(c *Config)
		want   string
	}{
		"none":               {func(c *Config) { c.Clusters = nil }, "clusters"},
		"no name":            {func(c *Config) { c.Clusters[0].Name = "" }, "clusters[0].name"},
		"a dot":              {func(c *Config) { c.Clusters[0].Name = "a.b" }, "clusters[0].name"},
		"upper case":         {func(c *Config) { c.Clusters[0].Name = "Prod" }, "clusters[0].name"},
		"too long":           {func(c *Config) { c.Clusters[0].Name = strings.Repeat("a", 64) }, "clusters[0].name"},
		"twice":              {func(c *Config) { c.Clusters = append(c.Clusters, good()) }, "clusters[1].name"},
		"no service account": {func(c *Config) { c.Clusters[0].ServiceAccounts = nil }, "clusters[0].service_accounts"},
		"no namespace":       {func(c *Config) { c.Clusters[0].ServiceAccounts[0] = "agent" }, "clusters[0].service_accounts[0]"},
		"a pattern":          {func(c *Config) { c.Clusters[0].ServiceAccounts[0] = "meshid/*" }, "clusters[0].service_accounts[0]"},
		"as a user":          {func(c *Config) { c.Clusters[0].ServiceAccounts[0] = "system:serviceaccount:a/b" }, "clusters[0].service_accounts[0]"},
		"neither":            {func(c *Config) { c.Clusters[0].TokenReview = nil }, "clusters[0]"},
		"both":               {func(c *Config) { c.Clusters[0].JWKS = &JWKSConfig{} }, "clusters[0]"},
	} {
		c := Config{Clusters: []ClusterConfig{good()}}
		tc.change(&c)
		err := c.Check()
		if bad, ok := errors.AsType[*SettingError](err); !ok || bad.Setting != tc.want {
			t.Errorf("%s: error %v, want one about %s", name, err, tc.want)
		}
	}
	c := Config{Clusters: []ClusterConfig{good()}}
	if err := c.Check(); err != nil || c.Clusters[0].Audience != "meshid" {
		t.Errorf("audience %q, error %v", c.Clusters[0].Audience, err)
	}
}

func TestAttester(t *testing.T) {
	for _, cluster := range []string{"", "a.b", "a/b", strings.Repeat("a", 64)} {
		if _, err := NewAttester(AgentConfig{Cluster: cluster}); err == nil {
			t.Errorf("cluster %q is accepted", cluster)
		}
	}
	w := newWorld(t, nil)
	for name, text := range map[string]string{
		"empty":      "",
		"no token":   "0123456789",
		"too long":   strings.Repeat("a.", maxToken),
		"two tokens": secret + "\n" + secret,
	} {
		w.write(t, text)
		if _, err := w.attester.Evidence(t.Context(), nil); err == nil {
			t.Errorf("%s: accepted", name)
		} else if strings.Contains(err.Error(), "eyJ") {
			t.Errorf("%s: the error repeats the token: %v", name, err)
		}
	}
	if err := os.Remove(w.file); err != nil {
		t.Fatal(err)
	}
	if _, err := w.attester.Evidence(t.Context(), nil); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "projected volume") {
		t.Errorf("no file: %v", err)
	}
}

func FuzzEvidence(f *testing.F) {
	f.Add([]byte{})
	f.Add(encode("prod", secret))
	f.Add([]byte{1, 200, 'a'})
	f.Fuzz(func(t *testing.T, b []byte) {
		cluster, token, err := decode(b)
		if err != nil {
			return
		}
		if string(encode(cluster, token)) != string(b) || CheckCluster(cluster) != nil || token == "" {
			t.Errorf("%x is decoded to %q and %q", b, cluster, token)
		}
	})
}
