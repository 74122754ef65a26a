package kube

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/go-cmp/cmp"
)

type values = map[string]any

// issuer signs tokens as a cluster does.
type issuer struct {
	kid string
	key crypto.Signer
	alg jose.SignatureAlgorithm
}

func newIssuer(t testing.TB, kid string) *issuer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &issuer{kid, key, jose.ES256}
}

func (i *issuer) jwk() jose.JSONWebKey {
	return jose.JSONWebKey{Key: i.key.Public(), KeyID: i.kid, Algorithm: string(i.alg), Use: "sig"}
}

// tokenValues are the claims of a good token, changed.
func tokenValues(change func(v values)) values {
	now := time.Now()
	v := values{
		"iss": "https://cluster.example", "aud": []string{"meshid"}, "jti": "id-1",
		"sub": "system:serviceaccount:meshid:agent",
		"exp": now.Add(time.Hour).Unix(), "iat": now.Unix(), "nbf": now.Unix(),
		"kubernetes.io": values{
			"namespace":      "meshid",
			"serviceaccount": values{"name": "agent", "uid": "sa-uid"},
			"pod":            values{"name": "agent-x", "uid": "pod-uid"},
			"node":           values{"name": "node-1", "uid": "node-uid"},
		},
	}
	if change != nil {
		change(v)
	}
	return v
}

func (i *issuer) token(t testing.TB, change func(v values)) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: i.alg, Key: jose.JSONWebKey{Key: i.key, KeyID: i.kid}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	payload, err := json.Marshal(tokenValues(change))
	if err != nil {
		t.Fatal(err)
	}
	signed, err := signer.Sign(payload)
	if err != nil {
		t.Fatal(err)
	}
	token, err := signed.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// keysFile writes a key set.
func keysFile(t testing.TB, path string, keys ...jose.JSONWebKey) {
	t.Helper()
	data, err := json.Marshal(jose.JSONWebKeySet{Keys: keys})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// wantIdentity is who a good token is of.
func wantIdentity(v values) *TokenIdentity {
	return &TokenIdentity{
		Namespace: "meshid", ServiceAccount: "agent", ServiceAccountUID: "sa-uid",
		PodName: "agent-x", PodUID: "pod-uid", NodeName: "node-1", NodeUID: "node-uid",
		ID: "id-1", IssuedAt: time.Unix(v["iat"].(int64), 0), ExpiresAt: time.Unix(v["exp"].(int64), 0),
	}
}

func TestKeys(t *testing.T) {
	i := newIssuer(t, "k1")
	path := filepath.Join(t.TempDir(), "jwks.json")
	keysFile(t, path, i.jwk())
	k, err := NewKeys(KeysConfig{Issuer: "https://cluster.example", File: path})
	if err != nil {
		t.Fatal(err)
	}
	var made values
	got, err := k.Verify(t.Context(), i.token(t, func(v values) { made = v }), "meshid")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(wantIdentity(made), got); diff != "" {
		t.Errorf("identity (-want +got):\n%s", diff)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	old := &issuer{"k2", rsaKey, jose.RS256}
	keysFile(t, path, i.jwk(), old.jwk())
	if _, err := k.Verify(t.Context(), old.token(t, nil), "meshid"); err != nil {
		t.Errorf("RS256, with a key that was added: %v", err)
	}
	keysFile(t, path, old.jwk())
	if _, err := k.Verify(t.Context(), i.token(t, nil), "meshid"); !errors.Is(err, ErrToken) {
		t.Errorf("with a key that was taken out: %v", err)
	}
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := k.Verify(t.Context(), old.token(t, nil), "meshid"); err == nil || errors.Is(err, ErrToken) {
		t.Errorf("with a spoilt file: %v", err)
	}
}

// C9: whatever is wrong with a token, it is refused, and not repeated.
func TestV_C9_OfflineTokens(t *testing.T) {
	i, other := newIssuer(t, "k1"), newIssuer(t, "k1")
	path := filepath.Join(t.TempDir(), "jwks.json")
	keysFile(t, path, i.jwk())
	k, err := NewKeys(KeysConfig{Issuer: "https://cluster.example", File: path})
	if err != nil {
		t.Fatal(err)
	}
	part := func(v any) string {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return base64.RawURLEncoding.EncodeToString(b)
	}
	good := i.token(t, nil)
	cut := strings.Split(good, ".")
	cluster := func(f func(values)) func(values) { return func(v values) { f(v["kubernetes.io"].(values)) } }
	for name, token := range map[string]string{
		"another audience":         i.token(t, func(v values) { v["aud"] = []string{"istio-ca"} }),
		"no audience":              i.token(t, func(v values) { delete(v, "aud") }),
		"another issuer":           i.token(t, func(v values) { v["iss"] = "https://other.example" }),
		"another cluster's key":    other.token(t, nil),
		"expired":                  i.token(t, func(v values) { v["exp"] = time.Now().Unix() }),
		"never expires":            i.token(t, func(v values) { delete(v, "exp") }),
		"not yet good":             i.token(t, func(v values) { v["nbf"] = time.Now().Add(time.Hour).Unix() }),
		"issued in the future":     i.token(t, func(v values) { v["iat"] = time.Now().Add(time.Hour).Unix() }),
		"no subject":               i.token(t, func(v values) { delete(v, "sub") }),
		"another subject":          i.token(t, func(v values) { v["sub"] = "system:serviceaccount:meshid:other" }),
		"a user's":                 i.token(t, func(v values) { delete(v, "kubernetes.io"); v["sub"] = "jane" }),
		"no service account":       i.token(t, cluster(func(v values) { delete(v, "serviceaccount") })),
		"no UID of the account":    i.token(t, cluster(func(v values) { v["serviceaccount"] = values{"name": "agent"} })),
		"a pod without UID":        i.token(t, cluster(func(v values) { v["pod"] = values{"name": "x"} })),
		"a time that is none":      i.token(t, func(v values) { v["exp"] = "tomorrow" }),
		"a time that is too large": i.token(t, func(v values) { v["exp"] = 1e30 }),
		"a negative time":          i.token(t, func(v values) { v["exp"] = -1 }),
		"legacy": i.token(t, func(v values) {
			clear(v)
			v["iss"] = "kubernetes/serviceaccount"
			v["sub"] = "system:serviceaccount:meshid:agent"
		}),
		"alg none":          part(values{"alg": "none", "kid": "k1"}) + "." + cut[1] + ".AAAA",
		"alg HS256":         part(values{"alg": "HS256", "kid": "k1"}) + "." + cut[1] + "." + cut[2],
		"another alg":       part(values{"alg": "ES384", "kid": "k1"}) + "." + cut[1] + "." + cut[2],
		"no kid":            part(values{"alg": "ES256"}) + "." + cut[1] + "." + cut[2],
		"another kid":       part(values{"alg": "ES256", "kid": "k2"}) + "." + cut[1] + "." + cut[2],
		"its own key":       part(values{"alg": "ES256", "kid": "k9", "jwk": values{"kty": "EC"}}) + "." + cut[1] + "." + cut[2],
		"no signature":      cut[0] + "." + cut[1] + ".",
		"two parts":         cut[0] + "." + cut[1],
		"four parts":        good + "." + cut[2],
		"padded":            good + "=",
		"a space":           good + " ",
		"a line feed":       good[:20] + "\n" + good[20:],
		"empty":             "",
		"opaque":            "0123456789abcdef",
		"too long":          strings.Repeat("a", maxToken+1),
		"claims are a list": cut[0] + "." + part([]int{1}) + "." + cut[2],
		"other claims":      cut[0] + "." + part(tokenValues(func(v values) { v["jti"] = "id-2" })) + "." + cut[2],
	} {
		t.Run(name, func(t *testing.T) {
			id, err := k.Verify(t.Context(), token, "meshid")
			if id != nil || !errors.Is(err, ErrToken) {
				t.Fatalf("identity %v, error %v", id, err)
			}
			if len(cut[2]) > 20 && strings.Contains(err.Error(), cut[2][:20]) {
				t.Errorf("the error repeats the token: %v", err)
			}
		})
	}
	if _, err := k.Verify(t.Context(), good, ""); err == nil || errors.Is(err, ErrToken) {
		t.Errorf("for no audience: %v", err)
	}
	// The spare bits of the last digit: the same signature, another text.
	last := good[len(good)-1]
	spare := good[:len(good)-1] + string("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"[strings.IndexByte("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_", last)|1])
	if _, err := k.Verify(t.Context(), spare, "meshid"); spare != good && !errors.Is(err, ErrToken) {
		t.Errorf("with spare bits: %v", err)
	}
	if _, err := k.Verify(t.Context(), good, "meshid"); err != nil {
		t.Errorf("the good one: %v", err)
	}
}

func TestNewKeys(t *testing.T) {
	i := newIssuer(t, "k1")
	dir := t.TempDir()
	file := func(name string, keys ...jose.JSONWebKey) string {
		path := filepath.Join(dir, name)
		keysFile(t, path, keys...)
		return path
	}
	good := file("good", i.jwk())
	private := i.jwk()
	private.Key = i.key
	encryption, nameless := i.jwk(), i.jwk()
	encryption.Use, nameless.KeyID = "enc", ""
	many := make([]jose.JSONWebKey, maxKeys+1)
	for n := range many {
		many[n] = i.jwk()
		many[n].KeyID = fmt.Sprint(n)
	}
	for name, c := range map[string]KeysConfig{
		"no issuer":       {File: good},
		"neither":         {Issuer: "x"},
		"both":            {Issuer: "x", File: good, URL: "https://x/jwks"},
		"http":            {Issuer: "x", URL: "http://x/jwks"},
		"no host":         {Issuer: "x", URL: "https:///jwks"},
		"a CA for a file": {Issuer: "x", File: good, CA: good},
		"no such file":    {Issuer: "x", File: good + "x"},
		"a private key":   {Issuer: "x", File: file("private", private)},
		"no keys":         {Issuer: "x", File: file("none")},
		"of another use":  {Issuer: "x", File: file("enc", encryption)},
		"without a name":  {Issuer: "x", File: file("nameless", nameless)},
		"two of a name":   {Issuer: "x", File: file("two", i.jwk(), i.jwk())},
		"too many":        {Issuer: "x", File: file("many", many...)},
		"a symmetric key": {Issuer: "x", File: file("hmac", jose.JSONWebKey{Key: []byte("secret"), KeyID: "h"})},
	} {
		if _, err := NewKeys(c); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// keyServer serves a key set.
type keyServer struct {
	*httptest.Server

	calls atomic.Int32

	mu   sync.Mutex
	keys []jose.JSONWebKey
	code int
}

func newKeyServer(t *testing.T, keys ...jose.JSONWebKey) (*keyServer, KeysConfig) {
	t.Helper()
	s := &keyServer{keys: keys}
	s.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.calls.Add(1)
		s.mu.Lock()
		defer s.mu.Unlock()
		switch {
		case s.code != 0:
			w.WriteHeader(s.code)
		case r.Header.Get("Authorization") != "Bearer mine":
			w.WriteHeader(http.StatusUnauthorized)
		default:
			_ = json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: s.keys})
		}
	}))
	t.Cleanup(s.Close)
	dir := t.TempDir()
	c := KeysConfig{Issuer: "https://cluster.example", URL: s.URL + "/openid/v1/jwks", CA: filepath.Join(dir, "ca"), TokenFile: filepath.Join(dir, "token")}
	if err := errors.Join(
		os.WriteFile(c.CA, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), 0o600),
		os.WriteFile(c.TokenFile, []byte("mine\n"), 0o600)); err != nil {
		t.Fatal(err)
	}
	return s, c
}

func (s *keyServer) set(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

// Keys change while the CA runs: a new one is fetched when it is first used, and
// strangers cannot have them fetched without end.
func TestKeysFromURL(t *testing.T) {
	first, second := newIssuer(t, "k1"), newIssuer(t, "k2")
	s, c := newKeyServer(t, first.jwk())
	k, err := NewKeys(c)
	if err != nil {
		t.Fatal(err)
	}
	verify := func(i *issuer) error {
		_, err := k.Verify(t.Context(), i.token(t, nil), "meshid")
		return err
	}
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if err := verify(first); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := s.calls.Load(); n != 1 {
		t.Errorf("fetched %d times", n)
	}
	// later moves the last fetch into the past.
	later := func(d time.Duration) {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.read, k.tried = k.read.Add(-d), k.tried.Add(-d)
	}
	s.set(func() { s.keys = append(s.keys, second.jwk()) })
	if err := verify(second); !errors.Is(err, ErrToken) {
		t.Errorf("a key that came within the pause: %v", err)
	}
	later(keysPause)
	if err := verify(second); err != nil {
		t.Errorf("a key that was added: %v", err)
	}
	later(keysPause)
	for range 50 {
		if err := verify(newIssuer(t, "unknown")); !errors.Is(err, ErrToken) {
			t.Error(err)
		}
	}
	if n := s.calls.Load(); n != 3 {
		t.Errorf("fetched %d times, want 3", n)
	}
	// It is away: what is known is used for a day, and nobody is told that an unknown
	// key is wrong.
	s.set(func() { s.code = http.StatusServiceUnavailable })
	later(keysLife)
	if err := verify(first); err != nil {
		t.Errorf("while it is away: %v", err)
	}
	if err := verify(newIssuer(t, "k3")); err == nil || errors.Is(err, ErrToken) {
		t.Errorf("a key that may be good: %v", err)
	}
	later(keysGrace)
	if err := verify(first); err == nil || errors.Is(err, ErrToken) || !strings.Contains(err.Error(), "503") {
		t.Errorf("after a day: %v", err)
	}
	// A key that the cluster took out.
	s.set(func() { s.code, s.keys = 0, s.keys[1:] })
	later(keysLife)
	if err := verify(first); !errors.Is(err, ErrToken) {
		t.Errorf("a key that was taken out: %v", err)
	}
}

func TestKeysFromURLFails(t *testing.T) {
	i := newIssuer(t, "k1")
	for name, tc := range map[string]struct {
		change func(s *keyServer, c *KeysConfig)
		want   string
	}{
		"no right":        {func(_ *keyServer, c *KeysConfig) { c.TokenFile = "" }, "service-account-issuer-discovery"},
		"no token":        {func(_ *keyServer, c *KeysConfig) { c.TokenFile += "x" }, "no such file"},
		"no CA":           {func(_ *keyServer, c *KeysConfig) { c.CA = "" }, "certificate"},
		"an empty CA":     {func(_ *keyServer, c *KeysConfig) { _ = os.WriteFile(c.CA, nil, 0o600) }, "no certificate"},
		"a redirect":      {func(s *keyServer, _ *KeysConfig) { s.code = http.StatusFound }, "302"},
		"no keys":         {func(s *keyServer, _ *KeysConfig) { s.keys = nil }, "no key"},
		"nobody is there": {func(s *keyServer, _ *KeysConfig) { s.Close() }, "refused"},
	} {
		t.Run(name, func(t *testing.T) {
			s, c := newKeyServer(t, i.jwk())
			tc.change(s, &c)
			k, err := NewKeys(c)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := k.Verify(t.Context(), i.token(t, nil), "meshid"); err == nil || errors.Is(err, ErrToken) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want one with %q", err, tc.want)
			}
		})
	}
}

// C9: what the cluster says of a token must be what the token says, and it must say so
// for the right audience.
func TestV_C9_TokenReview(t *testing.T) {
	i := newIssuer(t, "k1")
	good := func() values {
		return values{
			"authenticated": true, "audiences": []string{"meshid"},
			"user": values{
				"username": "system:serviceaccount:meshid:agent", "uid": "sa-uid",
				"extra": values{
					"authentication.kubernetes.io/pod-name": []string{"agent-x"}, "authentication.kubernetes.io/pod-uid": []string{"pod-uid"},
					"authentication.kubernetes.io/node-name": []string{"node-1"}, "authentication.kubernetes.io/node-uid": []string{"node-uid"},
				},
			},
		}
	}
	user := func(f func(values)) func(values) { return func(v values) { f(v["user"].(values)) } }
	extra := func(key string, value any) func(values) {
		return user(func(v values) { v["extra"].(values)["authentication.kubernetes.io/"+key] = value })
	}
	const accepted = "-"
	for name, tc := range map[string]struct {
		change func(status values)
		want   string
	}{
		"good": {func(values) {}, accepted},
		"no nodes, as older ones": {user(func(v values) {
			delete(v["extra"].(values), "authentication.kubernetes.io/node-name")
			delete(v["extra"].(values), "authentication.kubernetes.io/node-uid")
		}), accepted},
		"not authenticated":        {func(v values) { v["authenticated"] = false; v["error"] = "token expired" }, "token expired"},
		"not, and no reason":       {func(v values) { clear(v) }, "does not say why"},
		"an error with the token":  {func(v values) { v["authenticated"] = false; v["error"] = "bad " + i.token(t, nil) }, "not repeated"},
		"no audiences":             {func(v values) { delete(v, "audiences") }, "accepts it for"},
		"other audiences":          {func(v values) { v["audiences"] = []string{"https://kubernetes.default.svc"} }, "accepts it for"},
		"an empty user":            {func(v values) { v["user"] = values{} }, "its user"},
		"another user":             {user(func(v values) { v["username"] = "system:serviceaccount:meshid:other" }), "its user"},
		"a user from elsewhere":    {user(func(v values) { v["uid"] = "oidc-17" }), "UID"},
		"another pod":              {extra("pod-name", []string{"other"}), "its pod"},
		"the name of another pod":  {extra("pod-uid", []string{"other"}), "its pod's UID"},
		"no pod":                   {extra("pod-uid", nil), "its pod's UID"},
		"two pods":                 {extra("pod-uid", []string{"pod-uid", "other"}), "its pod's UID"},
		"another node":             {extra("node-name", []string{"other"}), "its node"},
		"the name of another node": {extra("node-uid", []string{"other"}), "its node's UID"},
	} {
		t.Run(name, func(t *testing.T) {
			status := good()
			tc.change(status)
			token := i.token(t, nil)
			r := NewReviewer(open(t, func(w http.ResponseWriter, r *http.Request) {
				var review tokenReview
				if err := json.NewDecoder(r.Body).Decode(&review); err != nil || review.Spec.Token != token || !cmp.Equal(review.Spec.Audiences, []string{"meshid"}) {
					t.Errorf("asked for %q, error %v", review.Spec.Audiences, err)
				}
				w.Header().Set("Content-Type", "application/json")
				w.WriteHeader(http.StatusCreated)
				_ = json.NewEncoder(w).Encode(values{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "status": status})
			}))
			id, err := r.Verify(t.Context(), token, "meshid")
			switch {
			case tc.want == accepted:
				if err != nil || id.PodUID != "pod-uid" || id.NodeUID != "node-uid" {
					t.Errorf("identity %v, error %v", id, err)
				}
			case id != nil || !errors.Is(err, ErrToken) || !strings.Contains(err.Error(), tc.want):
				t.Errorf("identity %v, error %v, want one with %q", id, err, tc.want)
			}
		})
	}
}

// What cannot be good costs the cluster nothing; what the cluster cannot say is no
// refusal.
func TestReviewerCalls(t *testing.T) {
	i := newIssuer(t, "k1")
	var calls atomic.Int32
	r := NewReviewer(open(t, func(w http.ResponseWriter, _ *http.Request) {
		calls.Add(1)
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusForbidden)
		_, _ = w.Write([]byte(`{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Forbidden","code":403}`))
	}))
	for _, token := range []string{"", "x", i.token(t, func(v values) { v["aud"] = "other" }), i.token(t, func(v values) { v["exp"] = 1 })} {
		if _, err := r.Verify(t.Context(), token, "meshid"); !errors.Is(err, ErrToken) {
			t.Errorf("error %v", err)
		}
	}
	if calls.Load() != 0 {
		t.Error("the cluster was asked for what cannot be good")
	}
	if _, err := r.Verify(t.Context(), i.token(t, nil), "meshid"); !errors.Is(err, ErrDenied) || errors.Is(err, ErrToken) || !strings.Contains(err.Error(), "system:auth-delegator") {
		t.Errorf("without the right: %v", err)
	}
}

func FuzzClaims(f *testing.F) {
	f.Add("a.b.c")
	f.Add(newIssuer(f, "k1").token(f, nil))
	f.Fuzz(func(t *testing.T, token string) {
		c, err := readClaims(token, "meshid", time.Now())
		if err != nil {
			if len(token) > 200 && strings.Contains(err.Error(), token) {
				t.Error("the error repeats the token")
			}
			return
		}
		if id := c.identity(); id.Namespace == "" || id.ServiceAccount == "" || !time.Now().Before(id.ExpiresAt.Add(time.Minute)) {
			t.Errorf("identity %v", id)
		}
	})
}
