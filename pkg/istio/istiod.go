package istio

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"

	"github.com/meshid/meshid/internal/kube"
	"github.com/meshid/meshid/pkg/server"
)

// Labels mark what belongs to Istio's configuration.
var Labels = map[string]string{"istio.io/config": "true"}

// Names of the control plane's own.
const (
	// DefaultRootsName is that of the ConfigMap that sidecars, gateways and ztunnel mount,
	// and RootsKey where the roots are in it.
	DefaultRootsName      = "istio-ca-root-cert"
	RootsKey              = "root-cert.pem"
	DefaultNamespace      = "istio-system"
	DefaultIstiodSecret   = "istiod-tls" //nolint:gosec // a name
	DefaultIstiodAccount  = "istiod-service-account"
	secretCertificate     = "tls.crt"
	secretKey             = "tls.key"
	istiodRetry           = 5 * time.Second
	istiodRecheck         = 30 * time.Second
	leastIstiodLife       = time.Minute         // that is left when it is renewed at the latest
	secretTypeTLS         = "kubernetes.io/tls" //nolint:gosec // a name
	istiodCertificateName = "control plane's certificate"
)

// IstiodConfig is what NewIstiod needs.
type IstiodConfig struct {
	TrustDomain spiffeid.TrustDomain
	Client      *kube.Client
	Issuer      Issuer
	// Roots are those of the trust domain now.
	Roots func() []*x509.Certificate
	// Namespace of the Secret and of the control plane's service account, their names;
	// Istio's by default.
	Namespace, Secret, ServiceAccount string
	Logger                            *slog.Logger
	// Report is called with what is wrong, and with "" when all is well.
	Report func(problem string)
}

// Istiod keeps the certificate of Istio's control plane in a Secret, from where istiod
// reads it again by itself. It asks for it as for any other: there must be an entry that
// gives the control plane's identity, with its DNS names, to a workload of its namespace
// and service account on the node that has the cluster's name.
type Istiod struct {
	cfg  IstiodConfig
	feed *kube.Feed
	wake chan struct{} // capacity 1: look at the state

	mu      sync.Mutex // guards what follows
	current *secret    // nil if there is none
}

type secret struct {
	kube.Object
	Type string            `json:"type,omitempty"`
	Data map[string][]byte `json:"data"`
}

// NewIstiod returns what Run has to be called on. The client may list and watch Secrets
// of this name in the namespace, and create and patch them.
func NewIstiod(cfg IstiodConfig) *Istiod {
	for _, d := range []struct {
		field     *string
		otherwise string
	}{{&cfg.Namespace, DefaultNamespace}, {&cfg.Secret, DefaultIstiodSecret}, {&cfg.ServiceAccount, DefaultIstiodAccount}} {
		if *d.field == "" {
			*d.field = d.otherwise
		}
	}
	if cfg.Report == nil {
		cfg.Report = func(string) {}
	}
	i := &Istiod{cfg: cfg, wake: make(chan struct{}, 1)}
	collection := i.path()
	collection.Name = ""
	i.feed = kube.Follow(cfg.Client, collection, kube.FollowOptions{Fields: "metadata.name=" + cfg.Secret},
		func(s *secret) *secret { return s }, kube.Reader[*secret](secretReader{i}))
	return i
}

func (i *Istiod) path() kube.Path {
	return kube.Path{Resource: kube.Resource{Version: "v1", Plural: "secrets"}, Namespace: i.cfg.Namespace, Name: i.cfg.Secret}
}

// Changed says that the roots may have changed. It never blocks.
func (i *Istiod) Changed() {
	select {
	case i.wake <- struct{}{}:
	default:
	}
}

// Run keeps the Secret until ctx ends.
func (i *Istiod) Run(ctx context.Context) error {
	var feeds sync.WaitGroup
	defer feeds.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	feeds.Go(func() { i.feed.Run(ctx) })
	timer := time.NewTimer(istiodRetry)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-i.wake:
		case <-timer.C:
		}
		next, err := i.reconcile(ctx)
		switch {
		case err == nil:
			i.cfg.Report("")
		case ctx.Err() == nil:
			i.cfg.Logger.WarnContext(ctx, "control plane's certificate cannot be kept", "cluster", i.cfg.Client.Name(), "err", err)
			i.cfg.Report(err.Error())
			next = istiodRetry
		}
		timer.Reset(next)
	}
}

// reconcile replaces the certificate if that is due, and returns when to look again.
func (i *Istiod) reconcile(ctx context.Context) (time.Duration, error) {
	if s := i.feed.State(); !s.Synced {
		if s.Err != nil {
			return 0, fmt.Errorf("the %s cannot be read: %w", istiodCertificateName, s.Err)
		}
		return istiodRetry, nil
	}
	i.mu.Lock()
	current := i.current
	i.mu.Unlock()
	now := time.Now()
	renewAt, why := i.judge(now, current)
	if why == "" {
		return min(max(renewAt.Sub(now), 0), istiodRecheck), nil
	}
	if err := i.replace(ctx, current); err != nil {
		if errors.Is(err, kube.ErrConflict) || errors.Is(err, kube.ErrExists) {
			return istiodRetry, nil // another CA was faster: its Secret comes by the feed
		}
		return 0, fmt.Errorf("the %s in Secret %s/%s of cluster %s, which %s, is not replaced: %w",
			istiodCertificateName, i.cfg.Namespace, i.cfg.Secret, i.cfg.Client.Name(), why, err)
	}
	i.cfg.Logger.InfoContext(ctx, "control plane's certificate replaced", "cluster", i.cfg.Client.Name(), "reason", why)
	return istiodRecheck, nil
}

// judge says why a Secret is to be replaced; "" if it is not before renewAt.
func (i *Istiod) judge(now time.Time, s *secret) (renewAt time.Time, why string) {
	if s == nil {
		return now, "is missing"
	}
	pair, err := tls.X509KeyPair(s.Data[secretCertificate], s.Data[secretKey])
	if err != nil {
		return now, "is damaged"
	}
	leaf, err := x509.ParseCertificate(pair.Certificate[0])
	if err != nil || len(leaf.URIs) != 1 || leaf.URIs[0].String() != i.id() {
		return now, "is of another identity"
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	for _, r := range i.cfg.Roots() {
		roots.AddCert(r)
	}
	for _, der := range pair.Certificate[1:] {
		if c, err := x509.ParseCertificate(der); err == nil {
			between.AddCert(c)
		}
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, CurrentTime: now}); err != nil {
		return now, "does not chain to a root of now, or has expired"
	}
	renewAt = leaf.NotBefore.Add(leaf.NotAfter.Sub(leaf.NotBefore) / 2)
	if !now.Before(renewAt) || leaf.NotAfter.Sub(now) < leastIstiodLife {
		return now, "has lived for half of its time"
	}
	return renewAt, ""
}

func (i *Istiod) id() string {
	return spiffeIDOf(i.cfg.TrustDomain, i.cfg.Namespace, i.cfg.ServiceAccount)
}

// replace makes a key, has it certified, and writes both, if the Secret is still the one
// that was judged.
func (i *Istiod) replace(ctx context.Context, current *secret) error {
	certificate, key, err := i.issue(ctx)
	if err != nil {
		return err
	}
	data := map[string][]byte{secretCertificate: certificate, secretKey: key}
	if current == nil {
		collection := i.path()
		collection.Name = ""
		return i.cfg.Client.Create(ctx, collection, &secret{
			Object: kube.Object{APIVersion: "v1", Kind: "Secret", Metadata: kube.Meta{
				Name: i.cfg.Secret, Namespace: i.cfg.Namespace, Labels: Labels,
			}},
			Type: secretTypeTLS, Data: data,
		}, nil)
	}
	return i.cfg.Client.Merge(ctx, i.path(), &secret{
		Object: kube.Object{Metadata: kube.Meta{ResourceVersion: current.Metadata.ResourceVersion}}, Data: data,
	}, nil)
}

func (i *Istiod) issue(ctx context.Context) (certificate, key []byte, err error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	var signer crypto.Signer = private
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, signer)
	if err != nil {
		return nil, nil, err
	}
	cluster := i.cfg.Client.Name()
	svid, err := i.cfg.Issuer.IssueDirect(ctx, &server.Direct{
		Node:     &attributesv1.Node{Method: Method, Id: cluster, K8S: &attributesv1.K8SNode{Cluster: cluster}},
		Workload: &attributesv1.Workload{K8S: &attributesv1.Kubernetes{Namespace: i.cfg.Namespace, ServiceAccount: i.cfg.ServiceAccount}},
		Instance: "secret:" + cluster + "/" + i.cfg.Namespace + "/" + i.cfg.Secret, SPIFFEID: i.id(), CSR: csr, Actor: "ca",
	})
	if err != nil {
		return nil, nil, fmt.Errorf("%w (is there an entry for %s with node.method == %q and node.id == %q? See docs/istio.md)", err, i.id(), Method, cluster)
	}
	var chain strings.Builder
	for _, der := range svid.Chain {
		chain.WriteString(encodePEM(der))
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, nil, err
	}
	return []byte(chain.String()), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

type secretReader struct{ *Istiod }

// Replace implements kube.Reader.
func (r secretReader) Replace(all []*secret) {
	var s *secret
	for _, other := range all {
		s = other
	}
	r.set(s)
}

// Set implements kube.Reader.
func (r secretReader) Set(s *secret) { r.set(s) }

// Delete implements kube.Reader.
func (r secretReader) Delete(*secret) { r.set(nil) }

func (r secretReader) set(s *secret) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.current = s
	r.Changed()
}
