// Package certmanager is the upstream CA that is an issuer of cert-manager, in any
// cluster whose API server can be reached. It makes CertificateRequest objects
// (cert-manager.io/v1) and watches what becomes of them. It approves nothing, and
// knows neither which CA is behind the issuer nor what for an intermediate is used.
//
// A request for an intermediate:
//
//  1. requests that a process before this one has left are deleted
//  2. a CertificateRequest for a CA is made, with a name that its CSR gives it
//  3. it is watched until it is issued, denied, invalid or failed
//  4. it is deleted, whatever became of it
package certmanager

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"slices"
	"time"

	"github.com/meshid/meshid/internal/cli"
	"github.com/meshid/meshid/internal/kube"
	"github.com/meshid/meshid/pkg/ca/upstream"
)

const (
	group = "cert-manager.io"
	// label is on all requests of meshid, of whichever CA.
	label, labelled = "app.kubernetes.io/managed-by", "meshid"
	prefix          = "meshid-"
	// abandoned is the age from which nobody waits for a request any more: a call
	// lasts for minutes.
	abandoned = time.Hour
	// maxAbandoned is how many of these are deleted before a request.
	maxAbandoned = 50
	// deleteTimeout bounds the deletion of a request.
	deleteTimeout = 10 * time.Second
	// look is how often the state of the watch, which is in memory, is looked at.
	look = time.Second
)

// Config says which issuer.
type Config struct {
	// Kubeconfig is the path of the kubeconfig by which the cluster is reached; the
	// service account of the CA's own pod if "". Files that it names are read again
	// when they change.
	Kubeconfig string `yaml:"kubeconfig"`
	// Context is the one of the kubeconfig; its current one if "".
	Context string `yaml:"context"`
	// Namespace is where the requests are made. An Issuer is in the same one.
	Namespace string `yaml:"namespace"`
	// Issuer is who signs.
	Issuer struct {
		// Name is the issuer's.
		Name string `yaml:"name"`
		// Kind is Issuer, ClusterIssuer, or that of an external issuer; Issuer if "".
		Kind string `yaml:"kind"`
		// Group is cert-manager.io, or that of an external issuer; cert-manager.io if "".
		Group string `yaml:"group"`
	} `yaml:"issuer"`
	// Roots is the path of the PEM certificates of the roots above the issuer, which
	// are then the only ones. Without it, the root is the one that the issuer names
	// (status.ca), which not all kinds of issuers do.
	Roots string `yaml:"roots"`
}

// CA is an issuer. It may be called concurrently.
type CA struct {
	config   Config
	client   *kube.Client
	requests kube.Path
	logger   *slog.Logger
}

var (
	nameForm  = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$`)
	spaceForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	kindForm  = regexp.MustCompile(`^[A-Z][A-Za-z0-9]{0,62}$`)
)

// New checks the settings, and reads the kubeconfig and the roots once.
func New(c Config, logger *slog.Logger) (*CA, error) {
	if c.Issuer.Kind == "" {
		c.Issuer.Kind = "Issuer"
	}
	if c.Issuer.Group == "" {
		c.Issuer.Group = group
	}
	switch {
	case !spaceForm.MatchString(c.Namespace):
		return nil, fmt.Errorf("namespace: %.100q is not the name of a namespace; write the one in which the requests are made, and in which the Issuer is", c.Namespace)
	case !nameForm.MatchString(c.Issuer.Name):
		return nil, fmt.Errorf("issuer.name: %.100q is not the name of an issuer; write the one that `kubectl get issuers,clusterissuers` lists", c.Issuer.Name)
	case !kindForm.MatchString(c.Issuer.Kind):
		return nil, fmt.Errorf("issuer.kind: %.100q is not a kind; write Issuer, ClusterIssuer, or the kind of an external issuer", c.Issuer.Kind)
	case !nameForm.MatchString(c.Issuer.Group):
		return nil, fmt.Errorf("issuer.group: %.100q is not an API group; write %s, or the group of an external issuer", c.Issuer.Group, group)
	case c.Issuer.Group == group && c.Issuer.Kind != "Issuer" && c.Issuer.Kind != "ClusterIssuer":
		return nil, fmt.Errorf("issuer.kind: %s has no kind %s: write Issuer or ClusterIssuer, or issuer.group", group, c.Issuer.Kind)
	case c.Context != "" && c.Kubeconfig == "":
		return nil, errors.New("context: is one of a kubeconfig: write kubeconfig")
	}
	if c.Roots != "" {
		if _, err := upstream.ReadCertificates(c.Roots); err != nil {
			return nil, fmt.Errorf("roots: %w", err)
		}
	}
	client, err := kube.Open(kube.Config{
		Name: "of cert-manager", Kubeconfig: c.Kubeconfig, Context: c.Context, UserAgent: "meshid-ca/" + cli.Version(), Logger: logger,
	})
	if err != nil {
		return nil, err
	}
	return &CA{
		config: c, client: client, logger: logger,
		requests: kube.Path{Resource: kube.Resource{Group: group, Version: "v1", Plural: "certificaterequests"}, Namespace: c.Namespace},
	}, nil
}

// Capabilities returns none: limits are those of the CA behind the issuer.
func (*CA) Capabilities() upstream.Capabilities { return upstream.Capabilities{} }

// CheckUse implements upstream.UseChecker.
func (s *CA) CheckUse(u upstream.Use) error { return u.CheckRootsFile("roots", s.config.Roots) }

// request is a CertificateRequest.
type request struct {
	kube.Object
	Spec   spec   `json:"spec"`
	Status status `json:"status,omitzero"`
}

type spec struct {
	Request   []byte    `json:"request"` // PEM
	IsCA      bool      `json:"isCA"`
	Usages    []string  `json:"usages"`
	Duration  string    `json:"duration"`
	IssuerRef issuerRef `json:"issuerRef"`
}

type issuerRef struct {
	Name  string `json:"name"`
	Kind  string `json:"kind"`
	Group string `json:"group"`
}

type status struct {
	Conditions  []kube.Condition `json:"conditions"`
	Certificate []byte           `json:"certificate"` // PEM, with what is between it and the root
	CA          []byte           `json:"ca"`          // PEM
}

// Mint has an intermediate signed.
func (s *CA) Mint(ctx context.Context, r *upstream.Request) (*upstream.Minted, error) {
	s.deleteAbandoned(ctx)
	wanted := s.describe(r)
	at := s.requests
	var made request
	if err := s.client.Create(ctx, at, wanted, &made); err != nil {
		return nil, failed("make a request", err)
	}
	at.Name = wanted.Metadata.Name
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), deleteTimeout)
		defer cancel()
		s.delete(ctx, made.Metadata)
	}()
	issued, err := s.await(ctx, at)
	if err != nil {
		return nil, err
	}
	return s.read(&issued.Status)
}

// describe makes the object. Its usages are those of the CSR: cert-manager refuses
// others, and adds some of its own if it is told none.
func (s *CA) describe(r *upstream.Request) *request {
	sum := sha256.Sum256(r.CSR)
	return &request{
		Object: kube.Object{
			APIVersion: group + "/v1", Kind: "CertificateRequest",
			Metadata: kube.Meta{Name: prefix + hex.EncodeToString(sum[:16]), Namespace: s.config.Namespace, Labels: map[string]string{label: labelled}},
		},
		Spec: spec{
			Request: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: r.CSR}),
			IsCA:    true, Usages: []string{"cert sign", "crl sign"}, Duration: r.TTL.String(),
			IssuerRef: issuerRef{Name: s.config.Issuer.Name, Kind: s.config.Issuer.Kind, Group: s.config.Issuer.Group},
		},
	}
}

// states gives each state of one request to who awaits it; nil if it is gone.
type states struct {
	ctx context.Context //nolint:containedctx // ends with the feed that calls
	to  chan *request
}

func (s states) send(r *request) {
	select {
	case s.to <- r:
	case <-s.ctx.Done():
	}
}

// Replace implements kube.Reader.
func (s states) Replace(all []*request) {
	if len(all) == 0 {
		s.send(nil)
	}
	for _, r := range all {
		s.send(r)
	}
}

// Set implements kube.Reader.
func (s states) Set(r *request) { s.send(r) }

// Delete implements kube.Reader.
func (s states) Delete(*request) { s.send(nil) }

// await watches a request until it is issued.
func (s *CA) await(ctx context.Context, at kube.Path) (*request, error) {
	watching, stop := context.WithCancel(ctx)
	reader := states{watching, make(chan *request)}
	collection := at
	collection.Name = ""
	feed := kube.Follow(s.client, collection, kube.FollowOptions{Fields: "metadata.name=" + at.Name}, func(r *request) *request { return r }, reader)
	done := make(chan struct{})
	go func() {
		defer close(done)
		feed.Run(watching)
	}()
	defer func() { stop(); <-done }()
	ticker := time.NewTicker(look)
	defer ticker.Stop()
	var last *request
	for {
		select {
		case r := <-reader.to:
			if r == nil {
				return nil, fmt.Errorf("somebody has deleted %s before it was issued", at)
			}
			if over, err := outcome(r.Status.Conditions); over || err != nil {
				return r, err
			}
			last = r
		case <-ticker.C:
			if err := feed.State().Err; errors.Is(err, kube.ErrDenied) {
				return nil, failed("watch a request", err)
			}
		case <-ctx.Done():
			if err := feed.State().Err; err != nil {
				return nil, failed("watch a request", err)
			}
			return nil, fmt.Errorf("%w: %s is %s: %w", upstream.ErrUnavailable, at, last.waits(), context.Cause(ctx))
		}
	}
}

// waits says what a request waits for.
func (r *request) waits() string {
	if r == nil {
		return "not seen"
	}
	if c := find(r.Status.Conditions, "Ready"); c != nil {
		return fmt.Sprintf("still %.100s: %q", c.Reason, upstream.Cut(c.Message))
	}
	if find(r.Status.Conditions, "Approved") == nil {
		return "approved by nobody: have cert-manager's approver, or a policy of approver-policy, approve it"
	}
	return "touched by no issuer: does it run, and has this one the name, kind and group that are configured?"
}

func find(all []kube.Condition, kind string) *kube.Condition {
	if i := slices.IndexFunc(all, func(c kube.Condition) bool { return c.Type == kind }); i >= 0 {
		return &all[i]
	}
	return nil
}

// outcome says whether a request is over, and why it is if nothing was issued.
func outcome(all []kube.Condition) (issued bool, err error) {
	for _, c := range all {
		said := fmt.Sprintf("%.100s: %q", c.Reason, upstream.Cut(c.Message))
		switch {
		case c.Type == "Denied" && c.Status == "True", c.Type == "Ready" && c.Status == "False" && c.Reason == "Denied":
			return false, fmt.Errorf("%w: the request was denied in cert-manager: %s", upstream.ErrDenied, said)
		case c.Type == "InvalidRequest" && c.Status == "True":
			return false, fmt.Errorf("%w: the issuer finds the request invalid: %s", upstream.ErrDenied, said)
		case c.Type == "Ready" && c.Status == "False" && c.Reason == "Failed":
			return false, fmt.Errorf("%w: the issuer has failed: %s", upstream.ErrUnavailable, said)
		case c.Type == "Ready" && c.Status == "True":
			issued = true
		}
	}
	return issued, nil
}

// read takes what was issued out of a status.
func (s *CA) read(st *status) (*upstream.Minted, error) {
	chain, err := upstream.ParseChain(2*upstream.MaxChain, string(st.Certificate))
	if err == nil && len(chain) == 0 {
		err = errors.New("it is empty")
	}
	if err != nil {
		return nil, fmt.Errorf("status.certificate of the request: %w", err)
	}
	others, err := upstream.ParseChain(upstream.MaxRoots, string(st.CA))
	if err != nil {
		return nil, fmt.Errorf("status.ca of the request: %w", err)
	}
	others = append(chain[1:], others...)
	if s.config.Roots != "" {
		roots, err := upstream.ReadCertificates(s.config.Roots)
		if err != nil {
			return nil, fmt.Errorf("roots: %w", err)
		}
		others = slices.DeleteFunc(others, func(c *x509.Certificate) bool { return bytes.Equal(c.RawSubject, c.RawIssuer) })
		others = append(others, roots...)
	}
	m := upstream.Arrange(chain[0], others)
	if len(m.Roots) == 0 {
		return nil, errors.New("the issuer does not say which root is above it (status.ca is empty, or a CA below the root): set roots to the path of its PEM certificate")
	}
	return m, nil
}

// deleteAbandoned deletes requests that nobody waits for. That it could not is no
// reason not to make another.
func (s *CA) deleteAbandoned(ctx context.Context) {
	var page kube.Page[kube.Object]
	if err := s.client.List(ctx, s.requests, kube.Selection{Labels: label + "=" + labelled, Limit: 10 * maxAbandoned}, &page); err != nil {
		s.logger.WarnContext(ctx, "old certificate requests are not deleted", "err", err)
		return
	}
	now, deleted := time.Now(), 0
	for _, o := range page.Items {
		if at := o.Metadata.CreationTimestamp; at != nil && now.Sub(*at) > abandoned && deleted < maxAbandoned {
			s.delete(ctx, o.Metadata)
			deleted++
		}
	}
}

func (s *CA) delete(ctx context.Context, m kube.Meta) {
	at := s.requests
	at.Name = m.Name
	err := s.client.Delete(ctx, at, m.UID)
	if err != nil && !errors.Is(err, kube.ErrNotFound) {
		s.logger.WarnContext(ctx, "a certificate request is not deleted, and will be after an hour", "err", err)
	}
}

// failed gives an error of the API server its kind.
func failed(doing string, err error) error {
	e, ok := errors.AsType[*kube.Error](err)
	switch {
	case ok && errors.Is(err, kube.ErrLimited):
		return &upstream.RateLimitError{RetryAfter: e.RetryAfter, Err: err}
	case errors.Is(err, kube.ErrDenied):
		return fmt.Errorf("%w: %s: %w: the Role in docs/upstream/certmanager.md has what is needed", upstream.ErrDenied, doing, err)
	case errors.Is(err, kube.ErrNotFound):
		return fmt.Errorf("%w: %s: %w: is cert-manager installed in this cluster, and is there this namespace?", upstream.ErrDenied, doing, err)
	case errors.Is(err, kube.ErrInvalid):
		return fmt.Errorf("%w: %s: %w", upstream.ErrDenied, doing, err)
	default:
		return fmt.Errorf("%w: %s: %w", upstream.ErrUnavailable, doing, err)
	}
}
