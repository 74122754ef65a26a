package agent

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/identity"
)

// TestHostileCA: nothing that the CA signs is served unless it is what the
// agent's own rendering of the entry says, for the key that the agent made.
func TestHostileCA(t *testing.T) {
	raw := func(uri string) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			names, err := asn1.Marshal([]asn1.RawValue{{Tag: 6, Class: asn1.ClassContextSpecific, Bytes: []byte(uri)}})
			if err != nil {
				panic(err)
			}
			c.URIs = nil
			c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: oidSAN, Value: names, Critical: true})
		}
	}
	for name, tamper := range map[string]func(*leaf){
		"another ID":                 func(l *leaf) { l.uris = []string{"spiffe://example.org/admin"} },
		"another trust domain":       func(l *leaf) { l.uris = []string{"spiffe://example.com/web"} },
		"two URIs":                   func(l *leaf) { l.uris = append(l.uris, "spiffe://example.org/admin") },
		"the same URI twice":         func(l *leaf) { l.uris = append(l.uris, l.uris[0]) },
		"no URI":                     func(l *leaf) { l.uris = nil },
		"upper-case scheme (A4, R8)": func(l *leaf) { l.change = raw("SPIFFE://example.org/web") },
		"space":                      func(l *leaf) { l.change = raw("spiffe://example.org/web ") },
		"trailing slash":             func(l *leaf) { l.change = raw("spiffe://example.org/web/") },
		"DNS name":                   func(l *leaf) { l.dnsNames = []string{"web"} },
		"IP address":                 func(l *leaf) { l.change = func(c *x509.Certificate) { c.IPAddresses = []net.IP{{127, 0, 0, 1}} } },
		"e-mail address":             func(l *leaf) { l.change = func(c *x509.Certificate) { c.EmailAddresses = []string{"a@b"} } },
		"CA": func(l *leaf) {
			l.change = func(c *x509.Certificate) { c.IsCA = true }
		},
		"may sign": func(l *leaf) {
			l.change = func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }
		},
		"no signatures": func(l *leaf) {
			l.change = func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment }
		},
		"expired":       func(l *leaf) { l.ttl = -time.Second },
		"not yet valid": func(l *leaf) { l.notBefore = time.Now().Add(time.Minute) },
		"too long":      func(l *leaf) { l.ttl = 48 * time.Hour },
		"other usage": func(l *leaf) {
			l.change = func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning} }
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, h *harness) {
				h.ca.tamper = func(l *leaf, _ *nodev1.IssueItem) { tamper(l) }
				h.ca.apply(uidEntry("web", "/web", 1000))
				w := h.subscribe(1, 1000)
				settleDown()
				mustHave(t, w)
				time.Sleep(2 * time.Minute)
				settleDown()
				mustHave(t, w)
				if n := h.ca.issued(); n < 2 || n > 80 {
					t.Errorf("%d requests", n)
				}
				if c := h.condition(condClock); (c.Severity == health.Error) != (name == "expired" || name == "not yet valid") {
					t.Errorf("condition %+v", c)
				}
				if !strings.Contains(h.log.String(), "svid of the ca is not accepted") {
					t.Error("nothing was logged")
				}
				h.ca.mu.Lock()
				h.ca.tamper = nil
				h.ca.mu.Unlock()
				time.Sleep(time.Minute)
				settleDown()
				mustHave(t, w, "/web")
				if c := h.condition(condClock); c.Severity != health.OK {
					t.Errorf("condition %+v", c)
				}
			})
		})
	}
}

// TestHostileCA_Chains: another key, another root, no chain, an endless one.
func TestHostileCA_Chains(t *testing.T) {
	ca := newFakeCA(t)
	defer ca.close()
	h := newHarness(t, ca, t.TempDir())
	id, err := identity.ParseID("spiffe://example.org/web")
	if err != nil {
		t.Fatal(err)
	}
	mine, err := newKeyPair()
	if err != nil {
		t.Fatal(err)
	}
	other, err := newKeyPair()
	if err != nil {
		t.Fatal(err)
	}
	sign := func(a *authority, k *keyPair) []byte {
		t.Helper()
		der, err := a.sign(k.key.Public(), leaf{uris: []string{id.String()}, ttl: time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	impostor := newAuthority(t, "root 1", nil)
	good := sign(ca.intermediate, mine)
	for _, tc := range []struct {
		name  string
		chain [][]byte
		ok    bool
	}{
		{"good", [][]byte{good, ca.intermediate.cert.Raw}, true},
		{"signed by the root", [][]byte{sign(ca.root, mine)}, true},
		{"another key", [][]byte{sign(ca.intermediate, other), ca.intermediate.cert.Raw}, false},
		{"another root of the same name", [][]byte{sign(impostor, mine), impostor.cert.Raw}, false},
		{"no intermediate", [][]byte{good}, false},
		{"wrong order", [][]byte{ca.intermediate.cert.Raw, good}, false},
		{"empty", nil, false},
		{"endless", slices.Repeat([][]byte{good}, maxChain+1), false},
		{"huge", [][]byte{make([]byte, maxCertificate+1)}, false},
		{"garbage", [][]byte{good, {0x30, 0x03, 1, 2, 3}}, false},
		{"garbage leaf", [][]byte{{}}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			chain, err := h.parser.chain(tc.chain)
			if err == nil {
				_, err = h.parser.verify(time.Now(), chain, []*x509.Certificate{ca.root.cert}, expectation{
					key: mine.key, id: exactly(id), usage: x509.ExtKeyUsageClientAuth, maxLife: 2 * time.Hour,
				})
			}
			if (err == nil) != tc.ok {
				t.Errorf("err = %v, want ok = %v", err, tc.ok)
			}
		})
	}
}

// TestV_T6_VerifyCA: the CA is verified completely, on every connection: Go's
// own verification is off, since it cannot look for a SPIFFE ID.
func TestV_T6_VerifyCA(t *testing.T) {
	root := newAuthority(t, "root", nil)
	intermediate := newAuthority(t, "intermediate", root)
	impostor := newAuthority(t, "root", nil)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert := func(a *authority, l leaf) *x509.Certificate {
		t.Helper()
		if l.ttl == 0 {
			l.ttl = time.Hour
		}
		der, err := a.sign(key.Public(), l)
		if err != nil {
			t.Fatal(err)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	caID := []string{"spiffe://example.org/meshid/ca"}
	good := cert(intermediate, leaf{uris: caID})
	pin, wrongPin := sha256.Sum256(root.cert.Raw), sha256.Sum256([]byte("x"))
	leafPin, interPin := sha256.Sum256(good.Raw), sha256.Sum256(intermediate.cert.Raw)
	full := []*x509.Certificate{good, intermediate.cert, root.cert}
	for _, tc := range []struct {
		name  string
		chain []*x509.Certificate
		roots []*x509.Certificate
		pin   []byte
		ok    bool
	}{
		{"anchor", full[:2], []*x509.Certificate{root.cert}, nil, true},
		{"pin", full, nil, pin[:], true},
		{"several anchors", full, []*x509.Certificate{impostor.cert, root.cert}, nil, true},
		{"nothing to trust", full, nil, nil, false},
		{"wrong pin", full, nil, wrongPin[:], false},
		{"short pin", full, nil, pin[:4], false},
		{"pin of the leaf", full, nil, leafPin[:], false},
		{"pin of the intermediate", full, nil, interPin[:], false},
		{"pinned root not shown", full[:2], nil, pin[:], false},
		{"other anchor", full, []*x509.Certificate{impostor.cert}, nil, false},
		{"anchors go before the pin", full, []*x509.Certificate{impostor.cert}, pin[:], false},
		{"pinned root shown by an impostor", []*x509.Certificate{cert(impostor, leaf{uris: caID}), impostor.cert, root.cert}, nil, pin[:], false},
		{"a workload", []*x509.Certificate{cert(intermediate, leaf{uris: []string{"spiffe://example.org/web"}}), intermediate.cert}, []*x509.Certificate{root.cert}, nil, false},
		{"a node", []*x509.Certificate{cert(intermediate, leaf{uris: []string{"spiffe://example.org/meshid/node/x509pop/a"}}), intermediate.cert}, []*x509.Certificate{root.cert}, nil, false},
		{"longer ID", []*x509.Certificate{cert(intermediate, leaf{uris: []string{"spiffe://example.org/meshid/ca2"}}), intermediate.cert}, []*x509.Certificate{root.cert}, nil, false},
		{"two IDs", []*x509.Certificate{cert(intermediate, leaf{uris: append(caID, "spiffe://example.org/x")}), intermediate.cert}, []*x509.Certificate{root.cert}, nil, false},
		{"expired", []*x509.Certificate{cert(intermediate, leaf{uris: caID, ttl: -time.Second}), intermediate.cert}, []*x509.Certificate{root.cert}, nil, false},
		{"client only", []*x509.Certificate{cert(intermediate, leaf{uris: caID, change: func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
		}}), intermediate.cert}, []*x509.Certificate{root.cert}, nil, false},
		{"signing certificate", []*x509.Certificate{intermediate.cert}, []*x509.Certificate{root.cert}, nil, false},
		{"nobody", nil, []*x509.Certificate{root.cert}, nil, false},
		{"endless", slices.Repeat(full, 4), []*x509.Certificate{root.cert}, nil, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			anchors := &trust{roots: tc.roots, pin: tc.pin}
			c := tlsToCA(testTD, anchors, nil)
			if c.MinVersion != 0x0304 || c.VerifyConnection == nil || c.ClientSessionCache != nil {
				t.Fatal("TLS configuration is not what this test is about")
			}
			err := verifyCA(time.Now(), testTD, tc.chain, tc.roots, tc.pin)
			if (err == nil) != tc.ok {
				t.Errorf("err = %v, want ok = %v", err, tc.ok)
			}
		})
	}
}

// TestPinnedRoot: an agent that knows only the hash of the root gets in, one that
// knows another does not send anything, and says so.
func TestPinnedRoot(t *testing.T) {
	t.Run("right", func(t *testing.T) {
		bubble(t, func(t *testing.T, h *harness) {
			if !h.Status().Connected {
				t.Errorf("status %+v", h.Status())
			}
		}, func(c *Config) {
			sum := sha256.Sum256(c.TrustAnchors[0].Raw)
			c.TrustAnchors, c.RootSHA256 = nil, sum[:]
		})
	})
	t.Run("wrong", func(t *testing.T) {
		bubble(t, func(t *testing.T, h *harness) {
			time.Sleep(time.Minute)
			settleDown()
			if h.Status().Connected || h.ca.attestations != 0 {
				t.Errorf("status %+v, %d attestations", h.Status(), h.ca.attestations)
			}
			if c := h.condition(condNode); c.Severity != health.Error || !strings.Contains(c.Message, "root_sha256") {
				t.Errorf("condition %+v", c)
			}
		}, func(c *Config) { c.TrustAnchors, c.RootSHA256 = nil, make([]byte, 32) })
	})
}

// TestRootsReplacedWhileAway: an agent that has been away for longer than the
// roots it knows comes back through its configured anchors.
func TestRootsReplacedWhileAway(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "agent")
	synctest.Test(t, func(t *testing.T) {
		ca := newFakeCA(t)
		defer ca.close()
		second := newAuthority(t, "root 2", nil)
		h := newHarness(t, ca, dir, func(c *Config) { c.TrustAnchors = append(c.TrustAnchors, second.cert) })
		h.start()
		defer h.stop()
		settleDown()
		ca.apply(uidEntry("web", "/web", 1000))
		w := h.subscribe(1, 1000)
		settleDown()
		mustHave(t, w, "/web")
		replace := func(root *authority) {
			ca.mu.Lock()
			defer ca.mu.Unlock()
			ca.root, ca.roots, ca.sequence = root, []*authority{root}, ca.sequence+1
			ca.intermediate = newAuthority(t, "intermediate", root)
		}
		ca.net.set(true)
		time.Sleep(3 * time.Hour)
		replace(newAuthority(t, "root 3", nil))
		ca.net.set(false)
		time.Sleep(time.Minute)
		settleDown()
		mustHave(t, w) // neither the bundle nor the anchors know root 3
		replace(second)
		time.Sleep(time.Minute)
		settleDown()
		if s := mustHave(t, w, "/web"); s.Bundle.Sequence != 3 {
			t.Errorf("bundle %+v", s.Bundle)
		}
	})
}
