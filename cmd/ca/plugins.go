package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/node/jointoken"
	"github.com/meshid/meshid/pkg/attest/node/x509pop"
	"github.com/meshid/meshid/pkg/ca"
	"github.com/meshid/meshid/pkg/ca/upstream"
	"github.com/meshid/meshid/pkg/ca/upstream/disk"
	"github.com/meshid/meshid/pkg/config"
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

// upstreamKind is one kind of upstream CA.
type upstreamKind struct {
	name    string
	section config.Section
	open    func(config.Section) (upstream.CA, error)
}

// upstreamKinds is the table of upstream CAs: one line a kind.
func upstreamKinds(u upstreamSettings) []upstreamKind {
	return []upstreamKind{
		{"disk", u.Disk, openUpstream(disk.New)},
	}
}

// openUpstream decodes a kind's section into the Config that its New takes.
func openUpstream[Config any, CA upstream.CA](open func(Config) (CA, error)) func(config.Section) (upstream.CA, error) {
	return func(s config.Section) (upstream.CA, error) {
		var c Config
		if err := s.Decode(&c); err != nil {
			return nil, err
		}
		return open(c)
	}
}

// openUpstreamCA returns the upstream CA that is configured, nil if none is.
func openUpstreamCA(u upstreamSettings, pins [][32]byte) (*ca.Upstream, error) {
	var found *ca.Upstream
	var names []string
	for _, kind := range upstreamKinds(u) {
		names = append(names, kind.name)
		if !kind.section.Present() {
			continue
		}
		if found != nil {
			return nil, kind.section.Errorf("", "upstream: %s is configured too: keep one of them", found.Kind)
		}
		opened, err := kind.open(kind.section)
		if _, located := errors.AsType[*config.Error](err); located {
			return nil, err
		}
		if err != nil {
			return nil, kind.section.Errorf("", "upstream %s: %v", kind.name, err)
		}
		found = &ca.Upstream{CA: opened, Kind: kind.name, Pins: pins}
	}
	if found == nil && len(pins) > 0 {
		return nil, fmt.Errorf("upstream: roots_sha256 is set, and no upstream CA: write a section of one of %s", strings.Join(names, ", "))
	}
	return found, nil
}
