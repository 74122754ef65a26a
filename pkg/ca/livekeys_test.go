package ca

import (
	"crypto/sha256"
	"crypto/x509"
	"testing"
	"time"

	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// Row B4: the authorities' keys, and another instance's.
func TestV_B4_KeysOfOthers(t *testing.T) {
	f := open(t, Config{})
	now := time.Now()
	s := f.state.Load()
	for _, cert := range []*x509.Certificate{s.signer.cert, s.active.cert} {
		pub, err := publicKeyOf(cert.RawSubjectPublicKeyInfo, "EC-P256")
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.Sign(now, &Request{ID: id("/a"), Key: pub})
		wantReason(t, err, ReasonCSR)
	}
	own, err := f.ServerCertificate()
	if err != nil {
		t.Fatal(err)
	}
	pub, err := publicKeyOf(own.Leaf.RawSubjectPublicKeyInfo, "EC-P256")
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.Sign(now, &Request{ID: id("/a"), Key: pub})
	wantReason(t, err, ReasonCSR)
}

func TestSpec_B16_SameKeyInTwoInstances(t *testing.T) {
	f := open(t, Config{})
	now := time.Now()
	key := parseKey(t, newKey(t))
	record := func(node, instance string) *ledgerv1.Record {
		return &ledgerv1.Record{Node: &ledgerv1.NodeRef{Id: node}, Instance: instance}
	}
	sign := func(at time.Time, r *ledgerv1.Record, path string) error {
		_, err := f.Sign(at, &Request{ID: id(path), Key: key, Record: r})
		return err
	}
	// One instance may have several identities for its key, and renew them.
	for _, path := range []string{"/a", "/b", "/a"} {
		if err := sign(now, record("n1", "c1"), path); err != nil {
			t.Fatal(err)
		}
	}
	wantReason(t, sign(now, record("n1", "c2"), "/a"), ReasonCSR)
	wantReason(t, sign(now, record("n2", "c1"), "/a"), ReasonCSR)
	wantReason(t, sign(now, nil, "/a"), ReasonCSR)
	// What has expired holds no key.
	if err := sign(now.Add(2*time.Hour), record("n2", "c2"), "/a"); err != nil {
		t.Fatal(err)
	}
}

func TestLiveKeysIsBounded(t *testing.T) {
	l := newLiveKeys(time.Hour, 6400)
	for i := range 20_000 {
		key := sha256.Sum256([]byte{byte(i), byte(i >> 8), byte(i >> 16)})
		if !l.claim(&key, 1, 1000, 2000) {
			t.Fatal("refused")
		}
	}
	n := 0
	for i := range l.shards {
		n += len(l.shards[i].newer) + len(l.shards[i].older)
	}
	if n > 6400 {
		t.Errorf("%d keys kept, the bound is 6400", n)
	}
	// Nothing that lives is forgotten below the bound.
	key := sha256.Sum256([]byte("x"))
	for now := int64(10_000); now < 13_600; now += 100 {
		l.claim(&key, 1, 10_000, 13_600)
		if l.claim(&key, 2, now, now+1) {
			t.Fatalf("forgotten after %d s", now-10_000)
		}
	}
	if !l.claim(&key, 2, 13_601, 13_700) {
		t.Error("an expired one still holds its key")
	}
}
