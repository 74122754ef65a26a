package kubernetes

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/meshid/meshid/internal/kube"
)

const (
	// annotationSequence is the number of the trust bundle that was written.
	annotationSequence = "meshid.io/bundle-sequence"
	// writers is how many ConfigMaps are written at the same time.
	writers = 8
	// newerGrace is how long what holds a newer bundle than ours is left alone: another CA
	// of the trust domain has heard of a change before this one.
	newerGrace = 30 * time.Second
)

var (
	namespaces = kube.Path{Resource: kube.Resource{Version: "v1", Plural: "namespaces"}}
	configMaps = kube.Path{Resource: kube.Resource{Version: "v1", Plural: "configmaps"}}
)

// Bundle returns a trust bundle, PEM, and its number, which grows. The same bundle has
// the same text in all CAs of a trust domain.
type Bundle func() (pem string, sequence uint64)

// ConfigMapsConfig is what NewConfigMaps needs.
type ConfigMapsConfig struct {
	Client *kube.Client
	Bundle Bundle
	// Name of the ConfigMaps, and the key in them that has the bundle.
	Name, Key string
	// Labels that they have; others stay.
	Labels map[string]string
	// Owner is the object with which they go; nil if they stay. Whoever may write it must not
	// have others' ConfigMaps changed, or taken away with it: what is there and does not
	// belong to it is left alone, and reported.
	Owner *kube.Owner
	// Selector of the namespaces, by label, as kubectl writes it; empty for all.
	Selector string
	Logger   *slog.Logger
	// Report is called with what is wrong, and with "" when all is well, in the given
	// number of namespaces.
	Report func(problem string, namespaces int)
}

// ConfigMaps keeps the trust bundle in a ConfigMap of each namespace that is chosen.
// Changes by others are repaired when they happen.
type ConfigMaps struct {
	cfg        ConfigMapsConfig
	feed       []*kube.Feed
	waker      waker
	namespaces *kube.Mirror[namespaceState]
	written    *kube.Mirror[written] // by namespace
	newer      map[string]time.Time  // since when one has a newer bundle than ours; owned by Run
}

// configMap is a ConfigMap, to be read and to be written.
type configMap struct {
	kube.Object
	Data map[string]string `json:"data"`
}

type namespace struct {
	kube.Object
	Status struct {
		Phase string `json:"phase"`
	} `json:"status"`
}

// written is what is kept of a ConfigMap that is there: whoever has a namespace can write
// a megabyte into it.
type written struct {
	namespace       string
	bundle          [sha256.Size]byte
	sequence        uint64 // 0 if it does not say
	owned, labelled bool
}

// NewConfigMaps returns what Run has to be called on. The client may list and watch
// namespaces and ConfigMaps, and create and patch ConfigMaps.
func NewConfigMaps(cfg ConfigMapsConfig) *ConfigMaps {
	if cfg.Report == nil {
		cfg.Report = func(string, int) {}
	}
	r := &ConfigMaps{cfg: cfg, waker: newWaker(), newer: make(map[string]time.Time)}
	r.namespaces = kube.NewMirror(func(n namespaceState) string { return n.name }, nil, r.Changed)
	r.written = kube.NewMirror(func(w written) string { return w.namespace }, nil, r.Changed)
	r.feed = []*kube.Feed{
		kube.Follow(cfg.Client, namespaces, kube.FollowOptions{Labels: cfg.Selector}, func(n *namespace) namespaceState {
			return namespaceState{n.Metadata.Name, n.Status.Phase != "Terminating" && n.Metadata.DeletionTimestamp == nil}
		}, kube.Reader[namespaceState](r.namespaces)),
		kube.Follow(cfg.Client, configMaps, kube.FollowOptions{Fields: "metadata.name=" + cfg.Name}, r.keep, kube.Reader[written](r.written)),
	}
	return r
}

func (r *ConfigMaps) keep(c *configMap) written {
	w := written{
		namespace: c.Metadata.Namespace, bundle: sha256.Sum256([]byte(c.Data[r.cfg.Key])), owned: ownedBy(&c.Object, r.cfg.Owner), labelled: r.labelled(c),
	}
	w.sequence, _ = strconv.ParseUint(c.Metadata.Annotations[annotationSequence], 10, 64)
	return w
}

// Changed says that the bundle may have changed. It never blocks.
func (r *ConfigMaps) Changed() { r.waker.wake() }

// Run keeps them until ctx ends.
func (r *ConfigMaps) Run(ctx context.Context) error {
	loop(ctx, r.waker, 0, r.reconcile, r.feed...)
	return nil
}

// reconcile writes what is not as it should be, and returns when to look again.
func (r *ConfigMaps) reconcile(ctx context.Context) time.Duration {
	for _, f := range r.feed {
		if s := f.State(); !s.Synced { // what is there is not known: nothing is wrong yet
			if s.Err != nil {
				r.cfg.Report(fmt.Sprintf("the trust bundle cannot be kept in cluster %s: %v", r.cfg.Client.Name(), s.Err), 0)
			}
			return retry
		}
	}
	pem, sequence := r.cfg.Bundle()
	due, foreign := r.due(time.Now(), pem, sequence)
	var group errgroup.Group
	group.SetLimit(writers)
	var mu sync.Mutex // guards failed
	var failed []error
	for _, namespace := range due {
		group.Go(func() error {
			if err := r.write(ctx, namespace, pem, sequence); err != nil && ctx.Err() == nil {
				mu.Lock()
				defer mu.Unlock()
				failed = append(failed, err)
			}
			return nil
		})
	}
	_ = group.Wait() // the errors are in failed
	if len(failed) > 0 {
		r.cfg.Logger.WarnContext(ctx, "the trust bundle cannot be written", "cluster", r.cfg.Client.Name(), "namespaces", len(failed), "err", failed[0])
		r.cfg.Report(fmt.Sprintf("the trust bundle cannot be written in %d namespaces of cluster %s: %v", len(failed), r.cfg.Client.Name(), failed[0]), 0)
		return retry
	}
	if len(due) > 0 {
		r.cfg.Logger.InfoContext(ctx, "trust bundle written", "cluster", r.cfg.Client.Name(), "namespaces", len(due), "sequence", sequence)
	}
	if len(foreign) > 0 {
		r.cfg.Report(fmt.Sprintf("the ConfigMap %s is there already in namespace %s (and %d others), and is somebody else's: delete it, or choose another name",
			r.cfg.Name, foreign[0], len(foreign)-1), 0)
		return recheck
	}
	r.cfg.Report("", len(r.living()))
	if len(r.newer) > 0 {
		return retry
	}
	return recheck
}

// due returns the namespaces whose ConfigMap is not as it should be, and those whose
// ConfigMap is somebody else's.
func (r *ConfigMaps) due(now time.Time, pem string, sequence uint64) (due, foreign []string) {
	living, written, bundle := r.living(), r.written.All(), sha256.Sum256([]byte(pem))
	maps.DeleteFunc(r.newer, func(namespace string, _ time.Time) bool { return !slices.Contains(living, namespace) })
	for _, namespace := range living {
		w, there := written[namespace]
		if there && !w.owned {
			foreign = append(foreign, namespace)
			continue
		}
		if there && w.bundle == bundle && w.labelled {
			delete(r.newer, namespace)
			continue
		}
		if there && w.sequence > sequence {
			since, known := r.newer[namespace]
			if !known {
				r.newer[namespace] = now
			}
			if !known || now.Sub(since) < newerGrace {
				continue
			}
		}
		delete(r.newer, namespace)
		due = append(due, namespace)
	}
	return due, foreign
}

// ownedBy says whether an object belongs to its owner, if it is to have one.
func ownedBy(o *kube.Object, owner *kube.Owner) bool {
	return owner == nil || slices.ContainsFunc(o.Metadata.OwnerReferences, func(other kube.Owner) bool { return other.UID == owner.UID })
}

// write sets what belongs to us in the ConfigMap of a namespace, and nothing else. A
// namespace that has gone needs none.
func (r *ConfigMaps) write(ctx context.Context, namespace, pem string, sequence uint64) error {
	path := configMaps
	path.Namespace, path.Name = namespace, r.cfg.Name
	object := &configMap{
		Object: kube.Object{APIVersion: "v1", Kind: "ConfigMap", Metadata: kube.Meta{
			Name: r.cfg.Name, Namespace: namespace, Labels: r.cfg.Labels,
			Annotations: map[string]string{annotationSequence: strconv.FormatUint(sequence, 10)},
		}},
		Data: map[string]string{r.cfg.Key: pem},
	}
	if r.cfg.Owner != nil {
		object.Metadata.OwnerReferences = []kube.Owner{*r.cfg.Owner}
	}
	err := r.cfg.Client.Apply(ctx, path, object, nil)
	if errors.Is(err, kube.ErrNotFound) {
		return nil
	}
	if err != nil && !r.namespaces.Get(namespace).live {
		return nil
	}
	return err
}

// living returns the namespaces that are not being deleted, sorted.
func (r *ConfigMaps) living() []string {
	var all []string
	for name, n := range r.namespaces.All() {
		if n.live {
			all = append(all, name)
		}
	}
	slices.Sort(all)
	return all
}

func (r *ConfigMaps) labelled(c *configMap) bool {
	for key, want := range r.cfg.Labels {
		if c.Metadata.Labels[key] != want {
			return false
		}
	}
	return true
}

type namespaceState struct {
	name string
	live bool
}
