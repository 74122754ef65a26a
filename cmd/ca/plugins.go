package main

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/node/jointoken"
	"github.com/meshid/meshid/pkg/attest/node/x509pop"
	"github.com/meshid/meshid/pkg/ca"
	"github.com/meshid/meshid/pkg/ca/upstream"
	"github.com/meshid/meshid/pkg/ca/upstream/awspca"
	"github.com/meshid/meshid/pkg/ca/upstream/certmanager"
	"github.com/meshid/meshid/pkg/ca/upstream/disk"
	"github.com/meshid/meshid/pkg/ca/upstream/ejbca"
	"github.com/meshid/meshid/pkg/ca/upstream/external"
	"github.com/meshid/meshid/pkg/ca/upstream/gcpcas"
	"github.com/meshid/meshid/pkg/ca/upstream/k8scsr"
	"github.com/meshid/meshid/pkg/ca/upstream/meshid"
	"github.com/meshid/meshid/pkg/ca/upstream/spire"
	"github.com/meshid/meshid/pkg/ca/upstream/stepca"
	"github.com/meshid/meshid/pkg/ca/upstream/vault"
	"github.com/meshid/meshid/pkg/config"
	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/ledger/export"
	"github.com/meshid/meshid/pkg/ledger/export/cef"
	"github.com/meshid/meshid/pkg/ledger/export/file"
	"github.com/meshid/meshid/pkg/ledger/export/ocsf"
	"github.com/meshid/meshid/pkg/ledger/export/otlp"
	"github.com/meshid/meshid/pkg/ledger/export/syslog"
	"github.com/meshid/meshid/pkg/ledger/export/webhook"
	"github.com/meshid/meshid/pkg/store"
)

// nodeVerifiers is the table of node attestation methods: one line a method.
func nodeVerifiers(n nodeAttestation, db *store.DB, kubernetes *clusters, reg prometheus.Registerer, logger *slog.Logger) ([]attest.NodeVerifier, error) {
	var verifiers []attest.NodeVerifier
	if n.JoinToken.Present() || !n.X509PoP.Present() && !n.K8sPSAT.Present() {
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
	if n.K8sPSAT.Present() {
		v, err := psatVerifier(n.K8sPSAT, db, kubernetes, reg, logger)
		if err != nil {
			return nil, err
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
func upstreamKinds(u upstreamSettings, logger *slog.Logger) []upstreamKind {
	return []upstreamKind{
		{"awspca", u.AWSPCA, openUpstream(awspca.New)},
		{"certmanager", u.CertManager, openUpstream(func(c certmanager.Config) (*certmanager.CA, error) { return certmanager.New(c, logger) })},
		{"disk", u.Disk, openUpstream(disk.New)},
		{"ejbca", u.EJBCA, openUpstream(ejbca.New)},
		{"external", u.External, openUpstream(func(c external.Config) (*external.CA, error) { return external.New(c, logger) })},
		{"gcpcas", u.GCPCAS, openUpstream(gcpcas.New)},
		{"k8scsr", u.K8sCSR, openUpstream(func(c k8scsr.Config) (*k8scsr.CA, error) { return k8scsr.New(c, logger) })},
		{"meshid", u.Meshid, openUpstream(meshid.New)},
		{"spire", u.SPIRE, openUpstream(spire.New)},
		{"stepca", u.StepCA, openUpstream(stepca.New)},
		{"vault", u.Vault, openUpstream(vault.New)},
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

// use is what the upstream CA is wanted for. A pin that fits nothing is no reason not
// to start: with the root that it has, a CA goes on.
func (v *validated) use() upstream.Use {
	return upstream.Use{
		TrustDomain: v.trustDomain, Leaves: v.Upstream.Leaves, KeyType: v.intermediateKey.Algorithm(),
		Lives: map[string]time.Duration{"svid.default_ttl": v.SVID.DefaultTTL.Or(0), "svid.node_ttl": v.SVID.NodeTTL.Or(0)},
	}
}

// checkUpstreamCA says what of the settings for an upstream CA can never work.
func checkUpstreamCA(v *validated) error {
	above, err := openUpstreamCA(v, slog.New(slog.DiscardHandler))
	if err != nil || above == nil {
		return err
	}
	use := v.use()
	use.Pins = v.pins
	if err := upstream.CheckUse(above.CA, use); err != nil {
		return v.file.Errorf("upstream."+above.Kind, "upstream %s: %v", above.Kind, err)
	}
	return nil
}

// openUpstreamCA returns the upstream CA that is configured, nil if none is. One
// that holds more than memory is an io.Closer.
func openUpstreamCA(v *validated, logger *slog.Logger) (*ca.Upstream, error) {
	u, pins := v.Upstream, v.pins
	var found *ca.Upstream
	var names []string
	for _, kind := range upstreamKinds(u, logger) {
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
		if err := upstream.CheckUse(opened, v.use()); err != nil {
			return nil, kind.section.Errorf("", "upstream %s: %v", kind.name, err)
		}
		found = &ca.Upstream{CA: opened, Kind: kind.name, Leaves: u.Leaves, Pins: pins}
	}
	if found == nil && u.Leaves {
		return nil, fmt.Errorf("upstream: leaves is set, and no upstream CA: write a section of one of %s", strings.Join(names, ", "))
	}
	if found == nil && len(pins) > 0 {
		return nil, fmt.Errorf("upstream: roots_sha256 is set, and no upstream CA: write a section of one of %s", strings.Join(names, ", "))
	}
	return found, nil
}

// exportFormats is the table of formats of exported records: one line a format.
var exportFormats = export.Formats{
	"json": ledger.FormatJSON,
	"cef":  cef.Format,
	"ocsf": ocsf.Format,
}

// exportKinds is the table of kinds of exports: one line a kind.
var exportKinds = []struct {
	name    string
	section func(exportSettings) config.Section
	open    func(config.Section, *slog.Logger) (export.Target, error)
}{
	{"file", func(s exportSettings) config.Section { return s.File }, target(func(c file.Config, _ *slog.Logger) (export.Target, error) { return file.New(c, exportFormats) })},
	{"syslog", func(s exportSettings) config.Section { return s.Syslog }, target(func(c syslog.Config, _ *slog.Logger) (export.Target, error) { return syslog.New(c, exportFormats) })},
	{"otlp", func(s exportSettings) config.Section { return s.OTLP }, target(func(c otlp.Config, l *slog.Logger) (export.Target, error) { return otlp.New(c, exportFormats, l) })},
	{"webhook", func(s exportSettings) config.Section { return s.Webhook }, target(func(c webhook.Config, _ *slog.Logger) (export.Target, error) { return webhook.New(c, exportFormats) })},
}

// target decodes the settings of a kind, and says where in the file a mistake in
// them is.
func target[C any](open func(C, *slog.Logger) (export.Target, error)) func(config.Section, *slog.Logger) (export.Target, error) {
	return func(s config.Section, logger *slog.Logger) (export.Target, error) {
		var c C
		if err := s.Decode(&c); err != nil {
			return nil, err
		}
		t, err := open(c, logger)
		if bad, ok := errors.AsType[*export.SettingError](err); ok {
			return nil, s.Errorf(bad.Setting, "%s", bad.Message)
		}
		return t, err
	}
}
