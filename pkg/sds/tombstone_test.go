package sds

import (
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/anypb"
)

func TestGraveyardIsBounded(t *testing.T) {
	g := newGraveyard()
	if _, err := g.tombstone("spiffe://a.test/x"); err != nil {
		t.Fatal(err)
	}
	for len(g.known) < maxTombstones {
		g.known[rand.Text()] = nil
	}
	if _, err := g.tombstone("spiffe://a.test/y"); err != nil {
		t.Fatal(err)
	}
	if n := len(g.known); n > maxTombstones {
		t.Errorf("%d tombstones", n)
	}
}

func TestTombstone(t *testing.T) {
	g := newGraveyard()
	s, err := g.tombstone("spiffe://a.test/x")
	if err != nil {
		t.Fatal(err)
	}
	again, err := g.tombstone("spiffe://a.test/x")
	if err != nil {
		t.Fatal(err)
	}
	if s != again {
		t.Error("made twice: it would be sent twice")
	}
	a, err := s.named(nameDefault)
	if err != nil {
		t.Fatal(err)
	}
	secret := secretsOf(t, []*anypb.Any{a})[nameDefault].GetTlsCertificate()
	block, _ := pem.Decode(secret.GetCertificateChain().GetInlineBytes())
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if !leaf.NotAfter.Before(time.Now()) {
		t.Errorf("expires at %s", leaf.NotAfter)
	}
	if diff := cmp.Diff([]string{"spiffe://a.test/x"}, uriStrings(leaf)); diff != "" {
		t.Error(diff)
	}
	if uris, err := rawURIs(leaf); err != nil || len(uris) != 1 {
		t.Errorf("%q %v", uris, err)
	}
	if leaf.IsCA {
		t.Error("is a CA")
	}
}

func uriStrings(c *x509.Certificate) []string {
	var s []string
	for _, u := range c.URIs {
		s = append(s, u.String())
	}
	return s
}
