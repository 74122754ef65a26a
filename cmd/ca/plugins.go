package main

import (
	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/node/jointoken"
	"github.com/meshid/meshid/pkg/attest/node/x509pop"
	"github.com/meshid/meshid/pkg/store"
)

// nodeVerifiers is the table of node attestation methods: one line a method.
func nodeVerifiers(n nodeAttestation, db *store.DB) ([]attest.NodeVerifier, error) {
	var verifiers []attest.NodeVerifier
	if n.JoinToken.Present() || !n.X509PoP.Present() {
		if err := n.JoinToken.Decode(&struct{}{}); err != nil {
			return nil, err
		}
		verifiers = append(verifiers, jointoken.NewVerifier(db))
	}
	if n.X509PoP.Present() {
		var c x509pop.Config
		if err := n.X509PoP.Decode(&c); err != nil {
			return nil, err
		}
		v, err := x509pop.NewVerifier(c)
		if err != nil {
			return nil, n.X509PoP.Errorf("ca_bundle", "%v", err)
		}
		verifiers = append(verifiers, v)
	}
	return verifiers, nil
}
