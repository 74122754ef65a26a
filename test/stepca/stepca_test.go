// Package stepca holds the upstream CA of kind stepca to a real step-ca, with the
// templates that docs/upstream/stepca.md shows, and runs a CA below it.
package stepca

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/meshid/meshid/pkg/ca/upstream"
	"github.com/meshid/meshid/pkg/ca/upstream/stepca"
	"github.com/meshid/meshid/pkg/ca/upstream/upstreamtest"
	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

func TestMain(m *testing.M) {
	os.Exit(local.Main(m)) //nolint:forbidigo // TestMain is this package's main
}

// server is a running step-ca with one provisioner of each kind.
type server struct {
	jwk, x5c, plain, leaves stepca.Config // plain has no template
	root                    string        // PEM
	process                 *local.Process
}

// template is what the page says.
func template(t *testing.T, name string) string {
	t.Helper()
	page, err := os.ReadFile(filepath.Join(require.Repository(), "docs/upstream/stepca.md"))
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile("(?s)```json file=" + regexp.QuoteMeta(name) + "\n(.*?)```").FindSubmatch(page)
	if found == nil {
		t.Fatalf("docs/upstream/stepca.md has no %s", name)
	}
	return string(found[1])
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// encrypt writes a JWK as `step crypto jwk create` does.
func encrypt(t *testing.T, key []byte, password string) []byte {
	t.Helper()
	e, err := jose.NewEncrypter(jose.A256GCM, jose.Recipient{Algorithm: jose.PBES2_HS256_A128KW, Key: []byte(password), PBES2Count: 100_000, PBES2Salt: []byte("0123456789abcdef")},
		(&jose.EncrypterOptions{}).WithContentType("jwk+json"))
	if err != nil {
		t.Fatal(err)
	}
	o, err := e.Encrypt(key)
	if err != nil {
		t.Fatal(err)
	}
	return []byte(o.FullSerialize())
}

// start starts step-ca.
func start(t *testing.T) *server {
	t.Helper()
	program := require.Tool(t, "step-ca")
	dir := t.TempDir()
	a := upstreamtest.NewAuthority(t, upstreamtest.Good)
	provisioner := jose.JSONWebKey{Key: newKey(t), KeyID: "meshid-1", Algorithm: "ES256", Use: "sig"}
	private, err := json.Marshal(provisioner)
	if err != nil {
		t.Fatal(err)
	}
	// The machine of the X5C provisioner.
	machine, machineRoot := newKey(t), upstreamtest.NewAuthority(t, upstreamtest.Good)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(3), Subject: pkix.Name{CommonName: "ca-1"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, machineRoot.Issuer, machine.Public(), machineRoot.Key)
	if err != nil {
		t.Fatal(err)
	}
	claims := map[string]any{"maxTLSCertDuration": "336h", "defaultTLSCertDuration": "168h"}
	options := map[string]any{"x509": map[string]string{"template": template(t, "intermediate.tpl")}}
	leaf := map[string]any{"x509": map[string]string{"template": template(t, "leaf.tpl")}}
	address := local.FreeAddress(t)
	config, err := json.Marshal(map[string]any{
		"root": upstreamtest.Write(t, dir+"/root.pem", upstreamtest.PEM(a.Root)), "crt": upstreamtest.Write(t, dir+"/issuer.pem", upstreamtest.PEM(a.Issuer)),
		"key": upstreamtest.Write(t, dir+"/issuer-key.pem", upstreamtest.KeyPEM(t, a.Key)), "address": address, "dnsNames": []string{"127.0.0.1"},
		"db": map[string]string{"type": "badgerv2", "dataSource": dir + "/db"}, "logger": map[string]string{"format": "text"},
		"authority": map[string]any{"provisioners": []any{
			map[string]any{"type": "JWK", "name": "meshid", "key": provisioner.Public(), "claims": claims, "options": options},
			map[string]any{"type": "JWK", "name": "plain", "key": provisioner.Public()},
			map[string]any{"type": "JWK", "name": "leaves", "key": provisioner.Public(), "options": leaf},
			map[string]any{"type": "X5C", "name": "machines", "roots": upstreamtest.PEM(machineRoot.Root), "claims": claims, "options": options},
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(a.Root.Raw)
	jwk := stepca.Config{
		URL: "https://" + address, RootSHA256: hex.EncodeToString(sum[:]), Provisioner: "meshid",
		Key: upstreamtest.Write(t, dir+"/provisioner.jwe", encrypt(t, private, "correct horse")), PasswordFile: upstreamtest.Write(t, dir+"/password", []byte("correct horse\n")),
	}
	plain, x5c := jwk, jwk
	plain.Provisioner, plain.Key, plain.PasswordFile = "plain", upstreamtest.Write(t, dir+"/provisioner.jwk", private), ""
	x5c.Provisioner, x5c.Key, x5c.PasswordFile = "machines", upstreamtest.Write(t, dir+"/machine-key.pem", upstreamtest.KeyPEM(t, machine)), ""
	x5c.Certificate = upstreamtest.Write(t, dir+"/machine.pem", append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), upstreamtest.PEM(machineRoot.Issuer)...))
	leaves := plain
	leaves.Provisioner = "leaves"
	s := &server{jwk: jwk, x5c: x5c, plain: plain, leaves: leaves, root: string(upstreamtest.PEM(a.Root))}
	s.process = local.Run(t, program, upstreamtest.Write(t, dir+"/ca.json", config))
	pool := x509.NewCertPool()
	pool.AddCert(a.Root)
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS13}, DisableKeepAlives: true}}
	local.Await(t, "step-ca", func(ctx context.Context) error {
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, jwk.URL+"/health", nil)
		if err != nil {
			return err
		}
		answer, err := client.Do(r)
		if err != nil {
			return fmt.Errorf("%w\n%s", err, s.process.Log())
		}
		return answer.Body.Close()
	})
	return s
}

// TestConformance is what the suite can do with a CA that only behaves well.
func TestConformance(t *testing.T) {
	s := start(t)
	for name, config := range map[string]stepca.Config{"jwk": s.jwk, "x5c": s.x5c} {
		t.Run(name, func(t *testing.T) {
			skip := map[upstreamtest.Behaviour]string{}
			for _, b := range []upstreamtest.Behaviour{
				upstreamtest.LongLife, upstreamtest.Repeated, upstreamtest.WrongKey, upstreamtest.NotCA, upstreamtest.Expired, upstreamtest.NotYetValid,
				upstreamtest.OtherName, upstreamtest.MoreNames, upstreamtest.PathLength, upstreamtest.NoKeyUsage, upstreamtest.Constrained, upstreamtest.OtherUsage,
				upstreamtest.MissingChain, upstreamtest.UnrelatedRoot, upstreamtest.ForeignRoot, upstreamtest.NoRoot, upstreamtest.LongChain,
				upstreamtest.HugeAnswer, upstreamtest.Garbage, upstreamtest.RateLimited, upstreamtest.Slow,
			} {
				skip[b] = "the real step-ca does not behave so; a fake does in pkg/ca/upstream/stepca"
			}
			upstreamtest.Run(t, upstreamtest.Kind{Real: true, Skip: skip, Start: func(t *testing.T, b upstreamtest.Behaviour, _ *upstreamtest.Authority) upstream.CA {
				c := config
				switch b { //nolint:exhaustive // the others are skipped
				case upstreamtest.Denied:
					c.Provisioner = "nobody"
				case upstreamtest.Gone:
					c.URL = "https://" + local.FreeAddress(t)
				}
				ca, err := stepca.New(c)
				if err != nil {
					t.Fatal(err)
				}
				return ca
			}})
		})
	}
	t.Run("leaves", func(t *testing.T) {
		for name, c := range map[string]stepca.Config{"template of the page": s.leaves, "step-ca's own template": s.plain} {
			ca, err := stepca.New(c)
			if err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if _, err := upstreamtest.SignLeaf(t.Context(), t, ca); err != nil {
					t.Errorf("%s: %v", name, err)
				}
			}
		}
		ca, err := stepca.New(s.jwk)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := upstreamtest.SignLeaf(t.Context(), t, ca); err == nil || !strings.Contains(err.Error(), "must be one for leaves") {
			t.Errorf("a template for CAs: %v", err)
		}
	})
	t.Run("a provisioner without a template", func(t *testing.T) {
		ca, err := stepca.New(s.plain)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := upstreamtest.Mint(t.Context(), t, ca); err == nil || !strings.Contains(err.Error(), "template used there must be one for subordinate CAs") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a life that is too long", func(t *testing.T) {
		ca, err := stepca.New(s.jwk)
		if err != nil {
			t.Fatal(err)
		}
		r, err := upstream.NewRequest(upstreamtest.TrustDomain, newKey(t), pkix.Name{CommonName: "meshid intermediate"}, 10_000*time.Hour, ca.Capabilities())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ca.Mint(t.Context(), r); !errors.Is(err, upstream.ErrDenied) {
			t.Errorf("got %v", err)
		}
	})
}

// TestCA runs a CA below step-ca.
func TestCA(t *testing.T) {
	s := start(t)
	ca := local.StartCA(t, local.CAOptions{Config: fmt.Sprintf(
		"upstream:\n  roots_sha256: [%[2]s]\n  stepca:\n    url: %[1]s\n    root_sha256: %[2]s\n    provisioner: meshid\n    key: %[3]s\n    password_file: %[4]s\n",
		s.jwk.URL, s.jwk.RootSHA256, s.jwk.Key, s.jwk.PasswordFile)})
	if got := ca.MustCommand(t, "bundle", "show"); strings.TrimSpace(got) != strings.TrimSpace(s.root) {
		t.Errorf("the bundle is not step-ca's root:\n%s", got)
	}
	ca.MustCommand(t, "authority", "rotate")
	if out := ca.MustCommand(t, "upstream", "check", "--config", filepath.Join(ca.Dir, "ca.yaml")); strings.Contains(out, "FAILED") {
		t.Error(out)
	}
	if err := ca.Stop(t); err != nil {
		t.Error(err)
	}
}
