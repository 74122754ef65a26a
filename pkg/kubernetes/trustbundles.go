package kubernetes

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/meshid/meshid/internal/kube"
)

var trustBundlePath = kube.Path{Resource: kube.Resource{Group: Group, Version: Version, Plural: "trustbundles"}}

// EncodeBundle writes roots as PEM, in an order that all CAs of a trust domain have in
// common.
func EncodeBundle(roots []*x509.Certificate) string {
	sorted := slices.Clone(roots)
	slices.SortFunc(sorted, func(a, b *x509.Certificate) int {
		if !a.NotBefore.Equal(b.NotBefore) {
			return a.NotBefore.Compare(b.NotBefore)
		}
		return bytes.Compare(a.Raw, b.Raw)
	})
	sorted = slices.CompactFunc(sorted, func(a, b *x509.Certificate) bool { return bytes.Equal(a.Raw, b.Raw) })
	var b strings.Builder
	for _, c := range sorted {
		b.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
	}
	return b.String()
}

// TrustBundlesConfig is what NewTrustBundles needs.
type TrustBundlesConfig struct {
	// Client may list and watch TrustBundle objects and patch their status, and what
	// ConfigMapsConfig and ClusterBundleConfig say.
	Client *kube.Client
	Bundle Bundle
	Logger *slog.Logger
	// Report is called with what is wrong, and with "" when all is well. It may be nil.
	Report func(problem string)
}

// TrustBundles publishes the trust bundle where the TrustBundle objects of a cluster
// say. What was published goes with the object.
type TrustBundles struct {
	cfg     TrustBundlesConfig
	feed    *kube.Feed
	waker   waker // also of what was reported
	objects *kube.Mirror[*trustBundle]

	mu      sync.Mutex              // guards what follows
	running map[string]*publication // by the object's name; changed by Run alone
}

type trustBundle struct {
	kube.Object
	Spec   trustBundleSpec   `json:"spec"`
	Status trustBundleStatus `json:"status"`
}

type trustBundleSpec struct {
	ConfigMap *struct {
		Name              string `json:"name"`
		Key               string `json:"key"`
		NamespaceSelector string `json:"namespaceSelector"`
	} `json:"configMap"`
	ClusterTrustBundle *struct {
		Name string `json:"name"`
	} `json:"clusterTrustBundle"`
}

type trustBundleStatus struct {
	ObservedGeneration int64       `json:"observedGeneration"`
	Conditions         []condition `json:"conditions"`
	// Sequence is the number of the bundle, and Roots are the SHA-256 of its roots.
	Sequence   int64    `json:"sequence"`
	Roots      []string `json:"roots"`
	Namespaces int      `json:"namespaces"`
}

const (
	conditionPublished = "Published"
	reasonPublished    = "Published"
	reasonFailed       = "Failed"
	reasonPending      = "Pending"
)

// publication is what runs for one object.
type publication struct {
	uid        string
	generation int64
	stop       func() // and waits
	changed    []func()

	mu         sync.Mutex        // guards what follows
	problems   map[string]string // by what is published; "" once it is
	namespaces int
}

// NewTrustBundles returns what Run has to be called on.
func NewTrustBundles(cfg TrustBundlesConfig) *TrustBundles {
	if cfg.Report == nil {
		cfg.Report = func(string) {}
	}
	t := &TrustBundles{cfg: cfg, waker: newWaker(), running: make(map[string]*publication)}
	t.objects = kube.NewMirror(func(o *trustBundle) string { return o.Metadata.Name }, nil, t.waker.wake)
	t.feed = kube.Follow(cfg.Client, trustBundlePath, kube.FollowOptions{}, func(o *trustBundle) *trustBundle { return o }, kube.Reader[*trustBundle](t.objects))
	return t
}

// Changed says that the bundle may have changed. It never blocks for long.
func (t *TrustBundles) Changed() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, p := range t.running {
		for _, changed := range p.changed {
			changed()
		}
	}
	t.waker.wake()
}

// Run publishes until ctx ends.
func (t *TrustBundles) Run(ctx context.Context) error {
	defer func() {
		for _, p := range t.running {
			p.stop()
		}
	}()
	loop(ctx, t.waker, 0, t.reconcile, t.feed)
	return nil
}

// reconcile starts and stops publications, and writes statuses.
func (t *TrustBundles) reconcile(ctx context.Context) time.Duration {
	if s := t.feed.State(); !s.Synced {
		if s.Err != nil {
			t.cfg.Report(unreadable("TrustBundle", t.cfg.Client, s.Err))
		}
		return retry
	}
	objects := t.objects.All()
	for name, p := range t.running {
		if o := objects[name]; o == nil || o.Metadata.UID != p.uid || o.Metadata.Generation != p.generation || o.Metadata.DeletionTimestamp != nil {
			p.stop()
			t.mu.Lock()
			delete(t.running, name)
			t.mu.Unlock()
		}
	}
	next, problem := recheck, ""
	for _, name := range slices.Sorted(maps.Keys(objects)) {
		o := objects[name]
		if o.Metadata.DeletionTimestamp != nil {
			continue
		}
		p, ok := t.running[name]
		if !ok {
			p = t.publish(ctx, o)
			t.mu.Lock()
			t.running[name] = p
			t.mu.Unlock()
		}
		status := t.status(o, p)
		if why := status.failed(); why != "" {
			problem = "TrustBundle " + name + ": " + why
		}
		if status.equal(&o.Status) {
			continue
		}
		if err := writeStatus(ctx, t.cfg.Client, trustBundlePath, &o.Object, status); err != nil {
			if ctx.Err() == nil {
				t.cfg.Logger.WarnContext(ctx, "the status of a TrustBundle cannot be written", "cluster", t.cfg.Client.Name(), "name", name, "err", err)
			}
			next = retry
		}
	}
	t.cfg.Report(problem)
	return next
}

// publish starts what an object asks for.
func (t *TrustBundles) publish(ctx context.Context, o *trustBundle) *publication {
	ctx, cancel := context.WithCancel(ctx)
	var parts sync.WaitGroup
	p := &publication{
		uid: o.Metadata.UID, generation: o.Metadata.Generation, problems: make(map[string]string),
		stop: func() { cancel(); parts.Wait() },
	}
	owner := &kube.Owner{APIVersion: Group + "/" + Version, Kind: "TrustBundle", Name: o.Metadata.Name, UID: o.Metadata.UID}
	report := func(what, problem string, namespaces int) {
		p.mu.Lock()
		p.problems[what] = problem
		if what == "configMap" && problem == "" {
			p.namespaces = namespaces
		}
		p.mu.Unlock()
		t.waker.wake()
	}
	if o.Spec.ConfigMap != nil {
		p.problems["configMap"] = pending
	}
	bundle := o.Spec.ClusterTrustBundle
	if bundle != nil {
		p.problems["clusterTrustBundle"] = pending
		if err := CheckClusterBundleName(bundle.Name); err != nil {
			p.problems["clusterTrustBundle"], bundle = err.Error(), nil
		}
	}
	if c := o.Spec.ConfigMap; c != nil {
		everywhere := NewConfigMaps(ConfigMapsConfig{
			Client: t.cfg.Client, Bundle: t.cfg.Bundle, Name: c.Name, Key: c.Key, Selector: c.NamespaceSelector, Owner: owner, Logger: t.cfg.Logger,
			Report: func(problem string, namespaces int) { report("configMap", problem, namespaces) },
		})
		p.changed = append(p.changed, everywhere.Changed)
		parts.Go(func() { _ = everywhere.Run(ctx) }) // it ends with ctx, and without an error
	}
	if bundle != nil {
		one := NewClusterBundle(ClusterBundleConfig{
			Client: t.cfg.Client, Bundle: t.cfg.Bundle, Name: bundle.Name, Owner: owner, Logger: t.cfg.Logger,
			Report: func(problem string) { report("clusterTrustBundle", problem, 0) },
		})
		p.changed = append(p.changed, one.Changed)
		parts.Go(func() { _ = one.Run(ctx) }) // the same
	}
	return p
}

// pending stands for what has not been published yet.
const pending = "..."

func (t *TrustBundles) status(o *trustBundle, p *publication) *trustBundleStatus {
	text, sequence := t.cfg.Bundle()
	s := &trustBundleStatus{ObservedGeneration: o.Metadata.Generation, Sequence: int64(sequence), Roots: fingerprints(text)} //nolint:gosec // a counter of changes
	c := condition{Type: conditionPublished, Status: "True", Reason: reasonPublished, ObservedGeneration: o.Metadata.Generation}
	p.mu.Lock()
	s.Namespaces = p.namespaces
	for _, what := range slices.Sorted(maps.Keys(p.problems)) {
		switch problem := p.problems[what]; problem {
		case "":
		case pending:
			if c.Reason == reasonPublished {
				c.Status, c.Reason, c.Message = "False", reasonPending, what+" is being written"
			}
		default:
			c.Status, c.Reason, c.Message = "False", reasonFailed, cut(problem)
		}
	}
	p.mu.Unlock()
	s.Conditions = []condition{c.since(o.Status.Conditions)}
	return s
}

func (s *trustBundleStatus) failed() string {
	for _, c := range s.Conditions {
		if c.Reason == reasonFailed {
			return c.Message
		}
	}
	return ""
}

func (s *trustBundleStatus) equal(o *trustBundleStatus) bool {
	return s.ObservedGeneration == o.ObservedGeneration && s.Sequence == o.Sequence && s.Namespaces == o.Namespaces &&
		slices.Equal(s.Roots, o.Roots) && slices.Equal(s.Conditions, o.Conditions)
}

// fingerprints are the SHA-256 of the certificates in a PEM text.
func fingerprints(text string) []string {
	all := []string{}
	for rest := []byte(text); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return all
		}
		sum := sha256.Sum256(block.Bytes)
		all = append(all, hex.EncodeToString(sum[:]))
	}
}

// writeStatus sets the status of an object, unless the object has changed since.
func writeStatus(ctx context.Context, client *kube.Client, path kube.Path, o *kube.Object, status any) error {
	path.Name, path.Subresource = o.Metadata.Name, "status"
	err := client.Merge(ctx, path, map[string]any{
		"metadata": map[string]any{"resourceVersion": o.Metadata.ResourceVersion, "uid": o.Metadata.UID},
		"status":   status,
	}, nil)
	if errors.Is(err, kube.ErrNotFound) || errors.Is(err, kube.ErrConflict) {
		return nil // it has gone, or changed: that is told
	}
	return err
}
