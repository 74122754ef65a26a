package istio

import (
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"google.golang.org/grpc/codes"

	"github.com/meshid/meshid/pkg/server"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
)

// Tokens of an OpenID Connect provider are good for machines, by entries for them.
func TestOIDC(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: key, KeyID: "k"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	var provider *httptest.Server
	down := true
	provider = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case down:
			w.WriteHeader(http.StatusInternalServerError)
		case r.URL.Path == "/.well-known/openid-configuration":
			_, _ = fmt.Fprintf(w, `{"issuer":%[1]q,"jwks_uri":"%[1]s/keys","authorization_endpoint":"x","id_token_signing_alg_values_supported":["RS256"]}`, provider.URL)
		default:
			_ = json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k", Algorithm: "RS256", Use: "sig"}}})
		}
	}))
	defer provider.Close()
	token := func(change map[string]any) string {
		t.Helper()
		claims := map[string]any{
			"iss": provider.URL, "sub": "system:serviceaccount:vms:db", "aud": []string{DefaultAudience}, "exp": time.Now().Add(time.Hour).Unix(), "iat": time.Now().Unix(),
		}
		maps.Copy(claims, change)
		text, err := json.Marshal(claims)
		if err != nil {
			t.Fatal(err)
		}
		signed, err := signer.Sign(text)
		if err != nil {
			t.Fatal(err)
		}
		compact, err := signed.CompactSerialize()
		if err != nil {
			t.Fatal(err)
		}
		return compact
	}
	idp := NewOIDC(provider.URL, provider.Client())
	m := newMesh(t, func(c *Config, _ *server.Config) {
		c.Clusters = append(c.Clusters, Cluster{Name: "idp", Issuer: provider.URL, Tokens: idp})
	})
	m.apply(&entryv1.Entry{
		Name: "machines", SpiffeId: "spiffe://example.org/ns/{k8s.namespace}/sa/{k8s.service_account}",
		Nodes: `node.method == "istio" && node.id == "idp"`, Workloads: `k8s.namespace == "vms"`,
	})
	_, err = m.client(token(nil)).call("")
	wantCode(t, "no provider", err, codes.Unavailable)
	down = false
	idp.tried = time.Time{}
	answer, err := m.client(token(map[string]any{"jti": "1"})).call("")
	if err != nil {
		t.Fatal(err)
	}
	if chain, _ := chainOf(t, answer); chain[0].URIs[0].String() != "spiffe://example.org/ns/vms/sa/db" {
		t.Errorf("it is %v", chain[0].URIs)
	}
	for name, change := range map[string]map[string]any{
		"another audience": {"aud": "istiod"}, "expired": {"exp": 1}, "no service account": {"sub": "alice"}, "two parts": {"sub": "system:serviceaccount:vms"},
		"four parts": {"sub": "system:serviceaccount:vms:db:x"}, "another issuer": {"iss": "https://idp.example.org"},
	} {
		_, err := m.client(token(change)).call("")
		wantCode(t, name, err, codes.Unauthenticated)
	}
	_, err = m.client(token(map[string]any{"sub": "system:serviceaccount:shop:web"})).call("")
	wantCode(t, "another namespace", err, codes.PermissionDenied)
	_, err = m.client(token(map[string]any{"jti": "2"})).call("spiffe://example.org/ns/shop/sa/web")
	wantCode(t, "on behalf of others", err, codes.Unauthenticated)
}
