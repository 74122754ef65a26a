package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"time"

	"github.com/meshid/meshid/internal/kube"
)

const certificatesGroup = "certificates.k8s.io"

// certificatesVersions are those of the group, the best first.
var certificatesVersions = []string{"v1", "v1beta1", "v1alpha1"}

// ClusterBundleConfig is what NewClusterBundle needs.
type ClusterBundleConfig struct {
	// Client may create and patch the object, and watch it; and, if it is of a signer,
	// attest for the signer.
	Client *kube.Client
	Bundle Bundle
	// Name of the object. Before the last colon stands the signer that it is of, with
	// colons for slashes: meshid.io:svid:bundle is of meshid.io/svid. Without a colon, it
	// is of none.
	Name string
	// Owner is the object with which it goes; nil if it stays. One that is there and does not
	// belong to it is left alone, as with ConfigMaps.
	Owner  *kube.Owner
	Logger *slog.Logger
	// Report is called with what is wrong, and with "" when all is well.
	Report func(problem string)
}

// ClusterBundle keeps the trust bundle in a ClusterTrustBundle, which pods can mount.
type ClusterBundle struct {
	cfg   ClusterBundleConfig
	waker waker
	there *kube.Mirror[*clusterTrustBundle]
	newer time.Time // since when it has been newer than ours; zero if it is not; owned by Run
}

type clusterTrustBundle struct {
	kube.Object
	Spec clusterTrustBundleSpec `json:"spec"`
}

type clusterTrustBundleSpec struct {
	SignerName  string `json:"signerName,omitempty"`
	TrustBundle string `json:"trustBundle"`
}

// SignerOf returns the signer that the name of a ClusterTrustBundle stands
// for; empty if it is of none.
func SignerOf(name string) string {
	i := strings.LastIndexByte(name, ':')
	if i < 0 {
		return ""
	}
	return strings.ReplaceAll(name[:i], ":", "/")
}

// CheckClusterBundleName says what is wrong with the name of a ClusterTrustBundle.
func CheckClusterBundleName(name string) error {
	signer := SignerOf(name)
	domain, path, ok := strings.Cut(signer, "/")
	// It becomes a part of a path and of a selector.
	strange := strings.ContainsFunc(name, func(r rune) bool { return !strings.ContainsRune("abcdefghijklmnopqrstuvwxyz0123456789-.:", r) })
	if name == "" || len(name) > 253 || strange || name[0] == '.' || strings.HasSuffix(name, ":") || strings.Contains(name, ":") && (!ok || domain == "" || path == "") {
		return fmt.Errorf("%q is no name of a ClusterTrustBundle; write one of a signer, such as meshid.io:svid:bundle, or one without colons", name)
	}
	return nil
}

// NewClusterBundle returns what Run has to be called on.
func NewClusterBundle(cfg ClusterBundleConfig) *ClusterBundle {
	if cfg.Report == nil {
		cfg.Report = func(string) {}
	}
	b := &ClusterBundle{cfg: cfg, waker: newWaker()}
	b.there = kube.NewMirror(func(o *clusterTrustBundle) string { return o.Metadata.Name }, nil, b.Changed)
	return b
}

// Changed says that the bundle may have changed. It never blocks.
func (b *ClusterBundle) Changed() { b.waker.wake() }

// Run keeps it until ctx ends.
func (b *ClusterBundle) Run(ctx context.Context) error {
	resource, ok := b.discover(ctx)
	if !ok {
		return nil
	}
	path := kube.Path{Resource: resource}
	feed := kube.Follow(b.cfg.Client, path, kube.FollowOptions{Fields: "metadata.name=" + b.cfg.Name},
		func(o *clusterTrustBundle) *clusterTrustBundle { return o }, kube.Reader[*clusterTrustBundle](b.there))
	loop(ctx, b.waker, 0, func(ctx context.Context) time.Duration { return b.reconcile(ctx, path, feed.State()) }, feed)
	return nil
}

// CertificatesResource returns the best version of a resource of the group that the API
// server has; the error wraps kube.ErrNotFound if it has none.
func CertificatesResource(ctx context.Context, c *kube.Client, plural string) (r kube.Resource, err error) {
	for _, version := range certificatesVersions {
		r = kube.Resource{Group: certificatesGroup, Version: version, Plural: plural}
		err = c.List(ctx, kube.Path{Resource: r}, kube.Selection{Limit: 1}, new(kube.Page[kube.Object]))
		if !errors.Is(err, kube.ErrNotFound) {
			break
		}
	}
	return r, err
}

// discover waits until the API server has the kind; it returns false if ctx ends.
func (b *ClusterBundle) discover(ctx context.Context) (r kube.Resource, ok bool) {
	for {
		r, err := CertificatesResource(ctx, b.cfg.Client, "clustertrustbundles")
		if err == nil {
			return r, true
		}
		if errors.Is(err, kube.ErrNotFound) {
			err = errors.New("the API server does not have this kind: enable ClusterTrustBundle there, or remove the setting")
		}
		if ctx.Err() == nil {
			b.cfg.Report(fmt.Sprintf("the ClusterTrustBundle %s of cluster %s cannot be kept: %v", b.cfg.Name, b.cfg.Client.Name(), err))
		}
		select {
		case <-ctx.Done():
			return kube.Resource{}, false
		case <-time.After(recheck):
		case <-b.waker:
		}
	}
}

// reconcile writes the object if it is not as it should be, and returns when to look
// again.
func (b *ClusterBundle) reconcile(ctx context.Context, path kube.Path, s kube.FeedState) time.Duration {
	if !s.Synced {
		if s.Err != nil {
			b.cfg.Report(fmt.Sprintf("the ClusterTrustBundle %s of cluster %s cannot be read: %v", b.cfg.Name, b.cfg.Client.Name(), s.Err))
		}
		return retry
	}
	pem, sequence := b.cfg.Bundle()
	switch b.compare(time.Now(), pem, sequence) {
	case same:
		b.cfg.Report("")
		return recheck
	case newer:
		return retry
	case foreign:
		b.cfg.Report(fmt.Sprintf("the ClusterTrustBundle %s is there already in cluster %s, and is somebody else's: delete it, or choose another name", b.cfg.Name, b.cfg.Client.Name()))
		return recheck
	default:
	}
	path.Name = b.cfg.Name
	object := &clusterTrustBundle{
		Object: kube.Object{APIVersion: path.Group + "/" + path.Version, Kind: "ClusterTrustBundle", Metadata: kube.Meta{
			Name: b.cfg.Name, Annotations: map[string]string{annotationSequence: strconv.FormatUint(sequence, 10)},
		}},
		Spec: clusterTrustBundleSpec{SignerName: SignerOf(b.cfg.Name), TrustBundle: pem},
	}
	if b.cfg.Owner != nil {
		object.Metadata.OwnerReferences = []kube.Owner{*b.cfg.Owner}
	}
	if err := b.cfg.Client.Apply(ctx, path, object, nil); err != nil {
		if ctx.Err() == nil {
			b.cfg.Logger.WarnContext(ctx, "the ClusterTrustBundle cannot be written", "cluster", b.cfg.Client.Name(), "name", b.cfg.Name, "err", err)
			b.cfg.Report(fmt.Sprintf("the ClusterTrustBundle %s of cluster %s cannot be written: %v", b.cfg.Name, b.cfg.Client.Name(), err))
		}
		return retry
	}
	b.cfg.Logger.InfoContext(ctx, "cluster trust bundle written", "cluster", b.cfg.Client.Name(), "name", b.cfg.Name, "sequence", sequence)
	b.cfg.Report("")
	return recheck
}

// comparison of what is written with what is to be written.
type comparison int

const (
	other comparison = iota
	same
	newer   // than ours, for a while
	foreign // not the owner's
)

func (b *ClusterBundle) compare(now time.Time, pem string, sequence uint64) comparison {
	since, there := b.newer, b.there.Get(b.cfg.Name)
	b.newer = time.Time{}
	switch {
	case there == nil:
		return other
	case !ownedBy(&there.Object, b.cfg.Owner):
		return foreign
	case there.Spec.TrustBundle == pem:
		return same
	}
	theirs, err := strconv.ParseUint(there.Metadata.Annotations[annotationSequence], 10, 64)
	if err != nil || theirs <= sequence || !since.IsZero() && now.Sub(since) >= newerGrace {
		return other
	}
	if b.newer = since; since.IsZero() {
		b.newer = now
	}
	return newer
}
