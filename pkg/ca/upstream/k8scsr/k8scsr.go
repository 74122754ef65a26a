// Package k8scsr is the upstream CA that is a signer of Kubernetes' own API for
// certificates, in any cluster whose API server can be reached. It makes
// CertificateSigningRequest objects (certificates.k8s.io/v1) and watches what becomes of
// them. It does not know which CA is behind the signer nor what for a certificate is
// used.
//
// A request:
//
//  1. a CertificateSigningRequest is made, for an intermediate or for a leaf
//  2. it is approved, if that is configured; else by somebody else
//  3. it is watched until it is issued, denied or failed; all that wait share one watch
//  4. it is deleted, whatever became of it
//  5. the roots, which the API does not say, are read from where they are configured
package k8scsr

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/meshid/meshid/internal/cli"
	"github.com/meshid/meshid/internal/kube"
	"github.com/meshid/meshid/pkg/ca/upstream"
)

const (
	apiGroup = "certificates.k8s.io"
	// label is on all requests of meshid; process on those of this process.
	label, labelled = "app.kubernetes.io/managed-by", "meshid"
	process         = "meshid.io/process"
	prefix          = "meshid-"
	// minLife is the least that spec.expirationSeconds may be.
	minLife = 600 * time.Second
	// leafRate is so many leaves a second as an API server bears, and etcd behind it: each
	// is an object that is made, changed twice and deleted.
	leafRate = 20
	// deleteTimeout bounds the deletion of a request.
	deleteTimeout = 10 * time.Second
	// look is how often the state of the watch, which is in memory, is looked at.
	look = time.Second
)

// Config says which signer.
type Config struct {
	// Kubeconfig is the path of the kubeconfig by which the cluster is reached; the
	// service account of the CA's own pod if "". Files that it names are read again
	// when they change.
	Kubeconfig string `yaml:"kubeconfig"`
	// Context is the one of the kubeconfig; its current one if "".
	Context string `yaml:"context"`
	// Signer is the name of the signer, such as example.com/mesh, or of an issuer of
	// cert-manager: issuers.cert-manager.io/NAMESPACE.NAME or
	// clusterissuers.cert-manager.io/NAME.
	Signer string `yaml:"signer"`
	// Approve has the CA approve its own requests, for signers that nobody else
	// approves for: an approval by who asks is no control.
	Approve bool `yaml:"approve"`
	// Annotations are on each request, for signers that want some.
	Annotations map[string]string `yaml:"annotations"`
	// Roots are those above the signer: one of the three.
	Roots Roots `yaml:"roots"`
}

// Roots are the roots above the signer, which the API does not say. They are read
// again for each request, and every minute.
type Roots struct {
	// File is the path of their PEM certificates.
	File string `yaml:"file"`
	// ConfigMap has their PEM certificates.
	ConfigMap ConfigMap `yaml:"config_map"`
	// TrustBundle is the name of a ClusterTrustBundle.
	TrustBundle string `yaml:"trust_bundle"`
}

// ConfigMap is a key of a ConfigMap.
type ConfigMap struct {
	// Namespace is where it is.
	Namespace string `yaml:"namespace"`
	// Name is its name.
	Name string `yaml:"name"`
	// Key is the key in it.
	Key string `yaml:"key" default:"ca.crt"`
}

// CA is a signer. It may be called concurrently.
type CA struct {
	config   Config
	client   *kube.Client
	requests kube.Path
	logger   *slog.Logger
	// mine is the value of the label process.
	mine  string
	watch watch
}

var (
	// signerForm is that of the API: a domain, and the name of the signer in it.
	signerForm     = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)+/[a-z0-9]([a-z0-9.-]*[a-z0-9])?$`)
	nameForm       = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$`)
	bundleForm     = regexp.MustCompile(`^[a-z0-9]([a-z0-9.:-]{0,251}[a-z0-9])?$`)
	spaceForm      = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	keyForm        = regexp.MustCompile(`^[-._a-zA-Z0-9]{1,253}$`)
	annotationForm = regexp.MustCompile(`^([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$`)
)

// New checks the settings, and reads the kubeconfig and a file of roots once.
func New(c Config, logger *slog.Logger) (*CA, error) {
	if c.Roots.ConfigMap.Name != "" && c.Roots.ConfigMap.Key == "" {
		c.Roots.ConfigMap.Key = "ca.crt"
	}
	if err := c.check(); err != nil {
		return nil, err
	}
	client, err := kube.Open(kube.Config{
		Name: "of the signer", Kubeconfig: c.Kubeconfig, Context: c.Context, UserAgent: "meshid-ca/" + cli.Version(), Logger: logger,
	})
	if err != nil {
		return nil, err
	}
	return &CA{
		config: c, client: client, logger: logger, mine: strings.ToLower(rand.Text()),
		requests: kube.Path{Resource: kube.Resource{Group: apiGroup, Version: "v1", Plural: "certificatesigningrequests"}},
		watch:    watch{waiting: make(map[string]*waiter)},
	}, nil
}

func (c *Config) check() error {
	if !signerForm.MatchString(c.Signer) || len(c.Signer) > 571 {
		return fmt.Errorf("signer: %.100q is not the name of a signer; write domain/name, such as clusterissuers.cert-manager.io/mesh", c.Signer)
	}
	if strings.HasPrefix(c.Signer, "kubernetes.io/") {
		return fmt.Errorf("signer: %s is one of Kubernetes' own, which sign for the API server and for kubelets only: name another", c.Signer)
	}
	if name, ok := strings.CutPrefix(c.Signer, "issuers.cert-manager.io/"); ok && !strings.Contains(name, ".") {
		return fmt.Errorf("signer: %s names no namespace: write issuers.cert-manager.io/NAMESPACE.%s, or clusterissuers.cert-manager.io/%[2]s", c.Signer, name)
	}
	if c.Context != "" && c.Kubeconfig == "" {
		return errors.New("context: is one of a kubeconfig: write kubeconfig")
	}
	for key := range c.Annotations {
		if !annotationForm.MatchString(key) {
			return fmt.Errorf("annotations: %.100q is not the name of an annotation", key)
		}
	}
	return c.Roots.check()
}

func (r *Roots) check() error {
	set := 0
	for _, is := range []bool{r.File != "", r.ConfigMap != ConfigMap{}, r.TrustBundle != ""} {
		if is {
			set++
		}
	}
	m := r.ConfigMap
	switch {
	case set != 1:
		return errors.New("roots: the API does not say which roots are above a signer: write one of file, config_map and trust_bundle")
	case m != ConfigMap{} && !spaceForm.MatchString(m.Namespace):
		return fmt.Errorf("roots.config_map.namespace: %.100q is not the name of a namespace", m.Namespace)
	case m != ConfigMap{} && !nameForm.MatchString(m.Name):
		return fmt.Errorf("roots.config_map.name: %.100q is not the name of a ConfigMap", m.Name)
	case m != ConfigMap{} && !keyForm.MatchString(m.Key):
		return fmt.Errorf("roots.config_map.key: %.100q is not a key of a ConfigMap", m.Key)
	case r.TrustBundle != "" && !bundleForm.MatchString(r.TrustBundle):
		return fmt.Errorf("roots.trust_bundle: %.100q is not the name of a ClusterTrustBundle", r.TrustBundle)
	case r.File != "":
		if _, err := upstream.ReadCertificates(r.File); err != nil {
			return fmt.Errorf("roots.file: %w", err)
		}
	}
	return nil
}

// Capabilities returns the limits of the API.
func (*CA) Capabilities() upstream.Capabilities {
	return upstream.Capabilities{MinTTL: minLife, MaxTTL: math.MaxInt32 * time.Second, TTLGranularity: time.Second, LeafRate: leafRate}
}

// CheckUse implements upstream.UseChecker.
func (s *CA) CheckUse(u upstream.Use) error {
	return u.CheckRootsFile("roots.file", s.config.Roots.File)
}

// request is a CertificateSigningRequest.
type request struct {
	kube.Object
	Spec   spec   `json:"spec"`
	Status status `json:"status"`
}

type spec struct {
	Request           []byte   `json:"request"` // PEM
	SignerName        string   `json:"signerName"`
	ExpirationSeconds int32    `json:"expirationSeconds"`
	Usages            []string `json:"usages"`
}

type status struct {
	Conditions  []kube.Condition `json:"conditions,omitempty"`
	Certificate []byte           `json:"certificate,omitempty"` // PEM, with what is between it and the root
}

// Mint has an intermediate signed.
func (s *CA) Mint(ctx context.Context, r *upstream.Request) (*upstream.Minted, error) {
	return s.sign(ctx, r, true, "cert sign", "crl sign")
}

// SignLeaf has an X.509-SVID signed.
func (s *CA) SignLeaf(ctx context.Context, r *upstream.Request) (*upstream.Minted, error) {
	return s.sign(ctx, r, false, "digital signature", "server auth", "client auth")
}

func (s *CA) sign(ctx context.Context, r *upstream.Request, isCA bool, usages ...string) (*upstream.Minted, error) {
	wanted := s.describe(r, isCA, usages)
	at := s.requests
	at.Name = wanted.Metadata.Name
	// Waited for before it is there, so that nothing that is said of it is missed.
	waiter, leave := s.await(ctx, at.Name)
	defer leave()
	var made request
	err := s.client.Create(ctx, s.requests, wanted, &made)
	if err == nil || errors.Is(err, kube.ErrUnavailable) { // it may have been made
		defer s.delete(ctx, at, made.Metadata.UID)
	}
	if err != nil {
		return nil, failed("make a request", err)
	}
	if s.config.Approve {
		if err := s.approve(ctx, at); err != nil {
			return nil, err
		}
	}
	issued, err := s.outcome(ctx, at, waiter)
	if err != nil {
		return nil, err
	}
	chain, err := upstream.ParseChain(2*upstream.MaxChain, string(issued))
	if err == nil && len(chain) == 0 {
		err = errors.New("it is empty")
	}
	if err != nil {
		return nil, fmt.Errorf("status.certificate of the request: %w", err)
	}
	roots, err := s.roots(ctx)
	if err != nil {
		return nil, err
	}
	// A root that the signer names is believed only if it is among those configured.
	between := slices.DeleteFunc(chain[1:], func(c *x509.Certificate) bool { return bytes.Equal(c.RawSubject, c.RawIssuer) })
	return upstream.Arrange(chain[0], append(between, roots...)), nil
}

// describe makes the object.
func (s *CA) describe(r *upstream.Request, isCA bool, usages []string) *request {
	annotations := make(map[string]string, len(s.config.Annotations)+2)
	maps.Copy(annotations, s.config.Annotations)
	// What cert-manager's signers want to be told beside the fields of the API.
	if domain, _, _ := strings.Cut(s.config.Signer, "/"); domain == "issuers.cert-manager.io" || domain == "clusterissuers.cert-manager.io" {
		annotations["experimental.cert-manager.io/request-is-ca"] = strconv.FormatBool(isCA)
		annotations["experimental.cert-manager.io/request-duration"] = r.TTL.String()
	}
	return &request{
		Object: kube.Object{
			APIVersion: apiGroup + "/v1", Kind: "CertificateSigningRequest",
			Metadata: kube.Meta{
				Name:   prefix + strings.ToLower(rand.Text()),
				Labels: map[string]string{label: labelled, process: s.mine}, Annotations: annotations,
			},
		},
		Spec: spec{
			Request:    pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: r.CSR}),
			SignerName: s.config.Signer, Usages: usages,
			ExpirationSeconds: int32(min(r.TTL/time.Second, math.MaxInt32)), //nolint:gosec // bounded
		},
	}
}

// approve approves a request. That somebody else was sooner, and denied it, is seen by
// who watches it.
func (s *CA) approve(ctx context.Context, at kube.Path) error {
	at.Subresource = "approval"
	approved := kube.Condition{Type: "Approved", Status: "True", Reason: "MeshidApproves", Message: "the CA of the mesh approves its own requests (approve: true)"}
	err := s.client.Merge(ctx, at, map[string]any{"status": map[string]any{"conditions": []kube.Condition{approved}}}, nil)
	if err == nil || errors.Is(err, kube.ErrInvalid) || errors.Is(err, kube.ErrConflict) {
		return nil
	}
	return failed("approve a request", err)
}

// delete deletes a request. One that is left, Kubernetes deletes within a day.
func (s *CA) delete(ctx context.Context, at kube.Path, uid string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), deleteTimeout)
	defer cancel()
	if err := s.client.Delete(ctx, at, uid); err != nil && !errors.Is(err, kube.ErrNotFound) {
		s.logger.WarnContext(ctx, "a certificate signing request is not deleted, kubernetes will do it", "err", err)
	}
}

// outcome waits until a request is issued, and returns the certificate.
func (s *CA) outcome(ctx context.Context, at kube.Path, w *waiter) ([]byte, error) {
	ticker := time.NewTicker(look)
	defer ticker.Stop()
	for {
		r, gone := s.watch.state(w)
		if gone {
			return nil, fmt.Errorf("somebody has deleted %s before it was issued", at)
		}
		if issued, err := r.outcome(); issued != nil || err != nil {
			return issued, err
		}
		select {
		case <-w.changed:
		case <-ticker.C:
			if err := s.watch.err(); errors.Is(err, kube.ErrDenied) {
				return nil, failed("watch requests", err)
			}
		case <-ctx.Done():
			if err := s.watch.err(); err != nil {
				return nil, failed("watch requests", err)
			}
			return nil, fmt.Errorf("%w: %s is %s: %w", upstream.ErrUnavailable, at, r.waits(), context.Cause(ctx))
		}
	}
}

// outcome returns the certificate once there is one, or why there will be none.
func (r *request) outcome() (issued []byte, err error) {
	if r == nil {
		return nil, nil
	}
	for _, c := range r.Status.Conditions {
		said := fmt.Sprintf("%.100s: %q", c.Reason, upstream.Cut(c.Message))
		switch {
		case c.Status == "False":
		case c.Type == "Denied":
			return nil, fmt.Errorf("%w: the request was denied: %s", upstream.ErrDenied, said)
		case c.Type == "Failed" && c.Reason == "DeniedReference": // cert-manager: see the error
			return nil, fmt.Errorf("%w: the signer has failed: %s: the Role in docs/upstream/k8scsr.md has what is needed", upstream.ErrDenied, said)
		case c.Type == "Failed":
			return nil, fmt.Errorf("%w: the signer has failed: %s", upstream.ErrUnavailable, said)
		}
	}
	if len(r.Status.Certificate) > 0 {
		return r.Status.Certificate, nil
	}
	return nil, nil
}

// waits says what a request waits for.
func (r *request) waits() string {
	switch {
	case r == nil:
		return "not seen"
	case !slices.ContainsFunc(r.Status.Conditions, func(c kube.Condition) bool { return c.Type == "Approved" }):
		return "approved by nobody: have an approver approve it, or set approve"
	default:
		return "approved, and signed by nobody: does the signer run, and has it the name that is configured?"
	}
}

// failed gives an error of the API server its kind.
func failed(doing string, err error) error {
	e, ok := errors.AsType[*kube.Error](err)
	switch {
	case ok && errors.Is(err, kube.ErrLimited):
		return &upstream.RateLimitError{RetryAfter: e.RetryAfter, Err: err}
	case errors.Is(err, kube.ErrDenied):
		return fmt.Errorf("%w: %s: %w: the roles in docs/upstream/k8scsr.md have what is needed", upstream.ErrDenied, doing, err)
	case errors.Is(err, kube.ErrInvalid), errors.Is(err, kube.ErrNotFound):
		return fmt.Errorf("%w: %s: %w", upstream.ErrDenied, doing, err)
	default:
		return fmt.Errorf("%w: %s: %w", upstream.ErrUnavailable, doing, err)
	}
}
