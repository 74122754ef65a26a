package disk

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshid/meshid/pkg/ca/upstream"
	"github.com/meshid/meshid/pkg/ca/upstream/upstreamtest"
)

// files are those of one CA.
func files(t *testing.T, a *upstreamtest.Authority) Config {
	t.Helper()
	dir := t.TempDir()
	c := Config{Certificate: filepath.Join(dir, "ca.pem"), Key: filepath.Join(dir, "ca-key.pem"), Roots: filepath.Join(dir, "roots.pem")}
	upstreamtest.Write(t, c.Certificate, upstreamtest.PEM(a.Issuer))
	upstreamtest.Write(t, c.Key, upstreamtest.KeyPEM(t, a.Key))
	upstreamtest.Write(t, c.Roots, upstreamtest.PEM(a.Root))
	return c
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

func TestConformance(t *testing.T) {
	signsItself := "this kind signs itself, what the CA does wrong can only be in its files"
	upstreamtest.Run(t, upstreamtest.Kind{
		Start: func(t *testing.T, b upstreamtest.Behaviour, a *upstreamtest.Authority) upstream.CA {
			other := upstreamtest.NewAuthority(t, upstreamtest.Good)
			c := files(t, a)
			ca, err := New(c)
			if err != nil {
				// What New refuses, Mint must refuse too: files change.
				ca = &CA{config: c}
			}
			switch b { //nolint:exhaustive // the others are in the certificates already
			case upstreamtest.WrongKey:
				upstreamtest.Write(t, c.Key, upstreamtest.KeyPEM(t, other.Key))
			case upstreamtest.MissingChain:
				upstreamtest.Write(t, c.Certificate, upstreamtest.PEM(a.Issuer, other.Issuer))
			case upstreamtest.UnrelatedRoot:
				upstreamtest.Write(t, c.Roots, upstreamtest.PEM(other.Root))
			case upstreamtest.NoRoot:
				upstreamtest.Write(t, c.Roots, nil)
			case upstreamtest.NotCA:
				upstreamtest.Write(t, c.Certificate, upstreamtest.PEM(leafOf(t, a)))
			case upstreamtest.LongChain:
				upstreamtest.Write(t, c.Roots, bytes.Repeat(upstreamtest.PEM(a.Root), 1000))
			case upstreamtest.HugeAnswer:
				upstreamtest.Write(t, c.Certificate, bytes.Repeat([]byte("x"), 64<<20))
			case upstreamtest.Garbage:
				upstreamtest.Write(t, c.Certificate, []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"))
			case upstreamtest.Gone:
				remove(t, c.Key)
			case upstreamtest.Denied:
				if err := os.Chmod(c.Key, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			return ca
		},
		Skip: map[upstreamtest.Behaviour]string{
			upstreamtest.LongLife: signsItself, upstreamtest.Repeated: signsItself, upstreamtest.NotYetValid: signsItself,
			upstreamtest.OtherName: signsItself, upstreamtest.MoreNames: signsItself, upstreamtest.NoKeyUsage: signsItself,
			upstreamtest.Slow: "files do not answer late", upstreamtest.RateLimited: "files have no limit",
		},
	})
}

// leafOf returns a certificate of the authority's key that is no CA's.
func leafOf(t *testing.T, a *upstreamtest.Authority) *x509.Certificate {
	t.Helper()
	c := *a.Issuer
	c.IsCA, c.MaxPathLen, c.ExtraExtensions = false, 0, nil
	der, err := x509.CreateCertificate(rand.Reader, &c, a.Root, a.Key.Public(), a.RootKey)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return leaf
}

func mint(t *testing.T, ca *CA) *upstream.Verified {
	t.Helper()
	key := upstreamtest.NewAuthority(t, upstreamtest.Good).Key
	r, err := upstream.NewRequest(upstreamtest.TrustDomain, key, pkix.Name{CommonName: "test"}, time.Hour, ca.Capabilities())
	if err != nil {
		t.Fatal(err)
	}
	m, err := ca.Mint(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	v, err := r.Verify(time.Now(), m)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// The operator's root itself may be the CA, without a file of roots.
func TestRootAlone(t *testing.T) {
	a := upstreamtest.NewAuthority(t, upstreamtest.Good)
	c := files(t, a)
	c.Roots = ""
	if _, err := New(c); err == nil || !strings.Contains(err.Error(), "set roots") {
		t.Errorf("an intermediate without its root: %v", err)
	}
	upstreamtest.Write(t, c.Certificate, upstreamtest.PEM(a.Root))
	upstreamtest.Write(t, c.Key, upstreamtest.KeyPEM(t, a.RootKey))
	ca, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	if v := mint(t, ca); len(v.Chain) != 1 || !v.Anchors[0].Equal(a.Root) {
		t.Errorf("chain of %d certificates to %q", len(v.Chain), v.Anchors[0].Subject)
	}
	// An intermediate between the two is given to verifiers.
	upstreamtest.Write(t, c.Certificate, upstreamtest.PEM(a.Issuer, a.Root))
	upstreamtest.Write(t, c.Key, upstreamtest.KeyPEM(t, a.Key))
	if v := mint(t, ca); len(v.Chain) != 2 || !v.Chain[1].Equal(a.Issuer) {
		t.Errorf("chain of %d certificates", len(v.Chain))
	}
}

// Files that are replaced take effect, for Mint and for those who watch.
func TestReplacedFiles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := upstreamtest.NewAuthority(t, upstreamtest.Good), upstreamtest.NewAuthority(t, upstreamtest.Good)
		c := files(t, a)
		ca, err := New(c)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		seen, ended := make(chan []*x509.Certificate, 4), make(chan error, 1)
		go func() {
			ended <- ca.WatchRoots(ctx, func(roots []*x509.Certificate) error {
				seen <- roots
				return nil
			})
		}()
		if roots := <-seen; len(roots) != 1 || !roots[0].Equal(a.Root) {
			t.Error("the first roots are not those in the file")
		}
		// Half of a replacement: nobody is told, and Mint says why.
		upstreamtest.Write(t, c.Roots, upstreamtest.PEM(b.Root))
		time.Sleep(10 * lookEvery)
		synctest.Wait()
		if len(seen) != 0 {
			t.Error("files that do not fit were taken")
		}
		upstreamtest.Write(t, c.Key, upstreamtest.KeyPEM(t, b.Key))
		upstreamtest.Write(t, c.Certificate, upstreamtest.PEM(b.Issuer))
		if roots := <-seen; !roots[0].Equal(b.Root) {
			t.Error("the new root was not seen")
		}
		if v := mint(t, ca); !v.Anchors[0].Equal(b.Root) {
			t.Error("Mint signs with the old files")
		}
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("WatchRoots = %v", err)
		}
	})
}

func TestBadFiles(t *testing.T) {
	good := upstreamtest.NewAuthority(t, upstreamtest.Good)
	for _, c := range []struct {
		name, want string
		change     func(*testing.T, *Config)
	}{
		{"nothing set", "set certificate and key", func(_ *testing.T, c *Config) { *c = Config{} }},
		{"no file", "no such file", func(_ *testing.T, c *Config) { c.Certificate += "x" }},
		{"no PEM", "no PEM certificate", func(t *testing.T, c *Config) { upstreamtest.Write(t, c.Certificate, []byte("hello")) }},
		{"key as certificate", "only certificates belong there", func(_ *testing.T, c *Config) { c.Certificate = c.Key }},
		{"certificate as key", "not a private key", func(_ *testing.T, c *Config) { c.Key = c.Certificate }},
		{"encrypted", "the key is encrypted", func(t *testing.T, c *Config) {
			upstreamtest.Write(t, c.Key, []byte("-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n"))
		}},
		{"malformed key", "malformed", func(t *testing.T, c *Config) {
			upstreamtest.Write(t, c.Key, []byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"))
		}},
		{"two keys", "more than a key", func(t *testing.T, c *Config) {
			upstreamtest.Write(t, c.Key, bytes.Repeat(upstreamtest.KeyPEM(t, good.Key), 2))
		}},
		{"mode", "chmod", func(t *testing.T, c *Config) {
			if err := os.Chmod(c.Key, 0o640); err != nil {
				t.Fatal(err)
			}
		}},
		{"path length", "path length 0", func(t *testing.T, c *Config) {
			*c = files(t, upstreamtest.NewAuthority(t, upstreamtest.PathLength))
		}},
		{"expired", "put its successor there", func(t *testing.T, c *Config) {
			*c = files(t, upstreamtest.NewAuthority(t, upstreamtest.Expired))
		}},
		{"intermediate as root", "not self-signed", func(t *testing.T, c *Config) { upstreamtest.Write(t, c.Roots, upstreamtest.PEM(good.Issuer)) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			config := files(t, good)
			c.change(t, &config)
			if _, err := New(config); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("New = %v, want %q", err, c.want)
			}
		})
	}
}

// An RSA CA, as enterprises have them, and keys as OpenSSL writes them.
func TestKeyForms(t *testing.T) {
	good := upstreamtest.NewAuthority(t, upstreamtest.Good)
	c := files(t, good)
	sec1, err := x509.MarshalECPrivateKey(good.Key)
	if err != nil {
		t.Fatal(err)
	}
	upstreamtest.Write(t, c.Key, append([]byte("-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"), pemOf("EC PRIVATE KEY", sec1)...))
	if _, err := New(c); err != nil {
		t.Error(err)
	}
}

func pemOf(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}
