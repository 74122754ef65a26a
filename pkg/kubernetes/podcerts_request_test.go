package kubernetes

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"testing"
	"time"

	"github.com/meshid/meshid/pkg/server"
)

// What the API server should have refused is refused here as well.
func TestCheckKey(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	proof := func(text string) []byte {
		digest := sha256.Sum256([]byte(text))
		signature, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
		if err != nil {
			t.Fatal(err)
		}
		return signature
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	other, err := x509.MarshalPKIXPublicKey(p224.Public())
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		csr, spki, proof []byte
		reason           string // empty if it is accepted
	}{
		"request":             {csr, nil, nil, ""},
		"key and proof":       {nil, spki, proof("uid-1"), ""},
		"another pod's proof": {nil, spki, proof("uid-2"), "InvalidRequest"},
		"no proof":            {nil, spki, nil, "InvalidRequest"},
		"neither":             {nil, nil, nil, "InvalidRequest"},
		"both":                {csr, spki, proof("uid-1"), "InvalidRequest"},
		"malformed request":   {csr[1:], nil, nil, "InvalidRequest"},
		"malformed key":       {nil, spki[1:], proof("uid-1"), "InvalidRequest"},
		"another kind":        {nil, other, proof("uid-1"), "UnsupportedKeyType"},
	} {
		r := &podRequest{podCertificateRequest: &podCertificateRequest{}}
		r.Spec.PodUID, r.Spec.StubPKCS10Request, r.Spec.PKIXPublicKey, r.Spec.ProofOfPossession = "uid-1", c.csr, c.spki, c.proof
		d := &server.Direct{}
		err := r.checkKey(d)
		refused, ok := errors.AsType[*denial](err)
		switch {
		case c.reason != "" && (!ok || refused.reason != c.reason):
			t.Errorf("%s: %v, want %s", name, err, c.reason)
		case c.reason == "" && (err != nil || !bytes.Equal(d.CSR, c.csr) || !bytes.Equal(d.PublicKey, c.spki)):
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestRefreshAt(t *testing.T) {
	begin := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	end := begin.Add(time.Hour)
	for at, want := range map[time.Duration]time.Duration{
		-time.Hour:                        10 * time.Minute,
		9 * time.Minute:                   10 * time.Minute,
		30*time.Minute + time.Millisecond: 30 * time.Minute,
		55 * time.Minute:                  50 * time.Minute,
	} {
		if got := refreshAt(begin.Add(at), begin, end).Sub(begin); got != want {
			t.Errorf("%s: %s, want %s", at, got, want)
		}
	}
}

// A request is what others have written: it is accepted or denied, and that is all.
func FuzzPodCertificateRequest(f *testing.F) {
	f.Add([]byte(`{"metadata":{"uid":"a"},"spec":{"podUID":"uid-1","stubPKCS10Request":"MAA=","unverifiedUserAnnotations":{"meshid.io/spiffe-id":"spiffe://a/b"}}}`))
	f.Add([]byte(`{"spec":{"podUID":"uid-1","pkixPublicKey":"MAA=","proofOfPossession":"MAA="},"status":{"conditions":[{"type":"Issued"}]}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		o := &podCertificateRequest{}
		if json.Unmarshal(text, o) != nil {
			return
		}
		o.answered()
		d := &server.Direct{}
		err := (&podRequest{podCertificateRequest: o}).checkKey(d)
		if refused, ok := errors.AsType[*denial](err); err != nil && (!ok || refused.reason == "" || refused.record == "") {
			t.Errorf("%v is no denial", err)
		}
		if err == nil && (len(d.CSR) > 0) == (len(d.PublicKey) > 0) {
			t.Error("it was accepted without a key, or with two")
		}
	})
}
