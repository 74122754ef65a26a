package envoy

import (
	"bytes"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"testing"
	"time"

	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/test/identitytest"
	"github.com/meshid/meshid/test/require"
)

// lister is an authority of its own name that may sign certificate revocation lists,
// below another one or a root.
func lister(t *testing.T, name string, above *identitytest.Authority) *identitytest.Authority {
	t.Helper()
	template := identitytest.CATemplate("a.test")
	template.Subject.CommonName = name
	template.KeyUsage |= x509.KeyUsageCRLSign
	a := identitytest.NewAuthority(t, "a.test")
	if above == nil {
		a.Cert = nil
		a.Cert = a.Sign(template, nil, a.Key.Public())
		return a
	}
	a.Cert = above.Sign(template, nil, a.Key.Public())
	a.Above = []*x509.Certificate{a.Cert}
	return a
}

// list is an authority's list of what it has revoked, until a time.
func list(t *testing.T, a *identitytest.Authority, until time.Time, revoked ...*identity.SVID) string {
	t.Helper()
	l := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now().Add(-time.Hour), NextUpdate: until}
	for _, v := range revoked {
		l.RevokedCertificateEntries = append(l.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: v.Chain[0].SerialNumber, RevocationTime: time.Now().Add(-time.Minute)})
	}
	der, err := x509.CreateRevocationList(rand.Reader, l, a.Cert, a.Key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der}))
}

// TestV_L3_WhatEnvoyMakesOfLists: what a real Envoy makes of revocation lists in a
// validation context, which is what revocation by lists rests on. The SPIFFE validator,
// which alone keeps trust domains apart, does not read them. The default validator does,
// and then refuses everybody below an authority whose list is missing or has expired: an
// intermediate without a list cuts off whoever it is the issuer of. Asked to look at
// leaves only, it needs no list of the root.
func TestV_L3_WhatEnvoyMakesOfLists(t *testing.T) {
	root := lister(t, "root", nil)
	old, fresh := lister(t, "old", root), lister(t, "fresh", root)
	revoked, other, newcomer := old.SVID("/revoked"), old.SVID("/other"), fresh.SVID("/newcomer")
	later, past := time.Now().Add(time.Hour), time.Now().Add(-time.Minute)
	ofRoot, ofOld, ofFresh := list(t, root, later), list(t, old, later, revoked), list(t, fresh, later)

	anchors := map[string]any{"inline_string": certificates(identity.NewCertificate(root.Cert))}
	lists := func(all ...string) map[string]any {
		text := ""
		for _, l := range all {
			text += l
		}
		return map[string]any{"trusted_ca": anchors, "crl": map[string]any{"inline_string": text}}
	}
	leafOnly := lists(ofOld, ofFresh)
	leafOnly["only_verify_leaf_cert_crl"] = true
	spiffe := lists(ofRoot, ofOld, ofFresh)
	delete(spiffe, "trusted_ca")
	spiffe["custom_validator_config"] = map[string]any{
		"name": "envoy.tls.cert_validator.spiffe",
		"typed_config": map[string]any{
			"@type":         "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.SPIFFECertValidatorConfig",
			"trust_domains": []any{map[string]any{"name": "a.test", "trust_bundle": anchors}},
		},
	}
	rows := map[string]struct {
		context                  map[string]any
		revoked, other, newcomer bool // whether it is let in
	}{
		"spiffe":          {spiffe, true, true, true},
		"default":         {lists(ofRoot, ofOld, ofFresh), false, true, true},
		"leaf_only":       {leafOnly, false, true, true},
		"missing":         {lists(ofRoot, ofOld), false, true, false},
		"missing_of_root": {lists(ofOld, ofFresh), false, false, false},
		"expired":         {lists(ofRoot, list(t, old, past, revoked), ofFresh), false, false, true},
		"none":            {map[string]any{"trusted_ca": anchors}, true, true, true},
	}
	server := root.SVID("/server")
	key, err := x509.MarshalPKCS8PrivateKey(server.Key)
	if err != nil {
		t.Fatal(err)
	}
	identityOfServer := []any{map[string]any{
		"certificate_chain": map[string]any{"inline_string": certificates(server.Chain...)},
		"private_key":       map[string]any{"inline_string": string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}))},
	}}
	var listeners []any
	for name, row := range rows {
		listeners = append(listeners, listener(name, map[string]any{
			"@type":                      "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
			"require_client_certificate": true,
			"common_tls_context":         map[string]any{"tls_certificates": identityOfServer, "validation_context": row.context},
		}))
	}
	// YAML is a superset of JSON.
	bootstrap, err := json.Marshal(map[string]any{
		"admin":            map[string]any{"address": loopback},
		"static_resources": map[string]any{"listeners": listeners},
	})
	if err != nil {
		t.Fatal(err)
	}
	p := startEnvoy(t, config{Name: "lists", Bootstrap: string(bootstrap)})
	p.waitLive()
	for name, row := range rows {
		port := p.port(name)
		for _, client := range []struct {
			v    *identity.SVID
			want bool
		}{{revoked, row.revoked}, {other, row.other}, {newcomer, row.newcomer}} {
			if _, _, err := call(port, client.v); (err == nil) != client.want {
				t.Errorf("%s: %s is let in: %v (%v), want %v", name, client.v.ID.Path(), err == nil, err, client.want)
			}
		}
	}
}

// withList returns a bundle of the root with the lists of intermediates.
func withList(t *testing.T, root *identitytest.Authority, sequence uint64, lists map[*identitytest.Authority]string) *identity.Bundle {
	t.Helper()
	b := root.Bundle(sequence)
	for a, l := range lists {
		block, _ := pem.Decode([]byte(l))
		parsed, err := identity.NewRevocationList(a.Cert.Raw, block.Bytes, b.Roots, time.Now(), time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		b.Lists = append(b.Lists, parsed)
	}
	return b
}

// TestV_L2_ListsOfTheAgent: a real Envoy with the secrets of the agent. What is put on a
// list is refused from the acknowledgement on, and nobody else is; what has no list yet
// is refused until it has one. The names that the proxy's own configuration lets in stay
// the only ones, with lists and without.
func TestV_L2_ListsOfTheAgent(t *testing.T) {
	require.Envoy(t)
	root := lister(t, "root", nil)
	old, fresh := lister(t, "old", root), lister(t, "fresh", root)
	stolen, other, stranger := old.SVID("/shop/stolen"), old.SVID("/shop/other"), old.SVID("/bank/other")
	newcomer, server := fresh.SVID("/shop/newcomer"), old.SVID("/server")
	later := time.Now().Add(72 * time.Hour)
	snapshot := func(b *identity.Bundle) *identity.Snapshot {
		return &identity.Snapshot{SVIDs: []*identity.SVID{server}, Bundle: b}
	}
	a := newAgent(t, snapshot(root.Bundle(1)))
	p := startEnvoy(t, config{Name: "lists", Socket: a.socket, Delta: true, Application: newApplication(t), Callers: "spiffe://a.test/shop/"})
	p.waitLive()
	port := p.port("inbound")
	for _, step := range []struct {
		what             string
		bundle           *identity.Bundle
		stolen, newcomer bool
	}{
		{"no lists", root.Bundle(1), true, true},
		{"empty list of one", withList(t, root, 2, map[*identitytest.Authority]string{old: list(t, old, later)}), true, false},
		{"empty lists of both", withList(t, root, 3, map[*identitytest.Authority]string{old: list(t, old, later), fresh: list(t, fresh, later)}), true, true},
		{"revoked", withList(t, root, 4, map[*identitytest.Authority]string{old: list(t, old, later, stolen), fresh: list(t, fresh, later)}), false, true},
		{"switched off", root.Bundle(5), true, true},
	} {
		a.source.Publish(snapshot(step.bundle))
		eventually(t, "the acknowledgement: "+step.what, func() bool { return a.source.LastAcknowledged() == step.bundle.Sequence })
		for _, client := range []struct {
			v    *identity.SVID
			want bool
		}{{stolen, step.stolen}, {other, true}, {newcomer, step.newcomer}, {stranger, false}, {nil, false}} {
			if _, _, err := call(port, client.v, root.Cert); (err == nil) != client.want {
				t.Errorf("%s: %v is let in: %v (%v)", step.what, client.v, err == nil, err)
			}
		}
	}
	if n := p.stat("update_rejected"); n != 0 {
		t.Errorf("%d updates rejected", n)
	}
}

var loopback = map[string]any{"socket_address": map[string]any{"address": "127.0.0.1", "port_value": 0}}

// listener answers whomever its TLS context lets in.
func listener(name string, tls map[string]any) map[string]any {
	return map[string]any{
		"name": name, "address": loopback,
		"filter_chains": []any{map[string]any{
			"transport_socket": map[string]any{"name": "envoy.transport_sockets.tls", "typed_config": tls},
			"filters": []any{map[string]any{
				"name": "envoy.filters.network.http_connection_manager",
				"typed_config": map[string]any{
					"@type":        "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
					"stat_prefix":  name,
					"http_filters": []any{map[string]any{"name": "envoy.filters.http.router", "typed_config": map[string]any{"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}},
					"route_config": map[string]any{"virtual_hosts": []any{map[string]any{
						"name": "all", "domains": []string{"*"},
						"routes": []any{map[string]any{"match": map[string]any{"prefix": "/"}, "direct_response": map[string]any{"status": 200, "body": map[string]any{"inline_string": "in"}}}},
					}}},
				},
			}},
		}},
	}
}

// certificates encodes certificates as PEM.
func certificates(all ...*identity.Certificate) string {
	var b bytes.Buffer
	for _, c := range all {
		b.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
	}
	return b.String()
}
