// Package istio is the CA for the clients of an unmodified Istio: sidecars, gateways
// and ztunnel, which ask with a token of their Kubernetes service account and without a
// node agent. It answers who such a client is, and for whom it may ask. It does not know
// which identities are given out: registration entries say so, in pkg/server, with the
// limits, bans, quarantines and records of every other request.
//
// It also keeps in a cluster what Istio's control plane writes only while it is the CA
// itself: the roots in each namespace, and the control plane's own certificate.
package istio

// The path of a request, each step a function, in this order. What costs least is
// first: clients that fail, fail again at once and for hours.
//
//  1. credentials   the caller's address and token, or certificate; the cluster it names
//  2. backoff       what was refused a moment ago is refused again, unread
//  3. verify        the token: from the cache of verdicts, or by the cluster
//  4. pod           the caller's pod, live, as the cluster itself says
//  5. subject       whose identity: the caller's, or for a node's proxy that of a pod there
//  6. request       the CSR, and that it names nobody else
//  7. pace          no workload asks more often than it can need to
//  8. issue         server.IssueDirect: entries, limits, signature, durable record
//  9. answer        one certificate an element, all roots in the last

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/singleflight"
	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	istiov1 "github.com/meshid/meshid/proto/istio/v1"

	"github.com/meshid/meshid/pkg/server"
)

// DefaultAudience is that of the tokens that Istio mounts for its clients.
const DefaultAudience = "istio-ca"

// Method is the node attestation method in the facts of nodes whose pods ask here.
const Method = "istio"

// Config is what New needs. Issuer, TrustDomain, Logger and Registerer are required.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	Issuer      Issuer
	// Clusters whose workloads are served; a client names one of them, or none.
	Clusters []Cluster
	// Audiences of which a token must have one; default DefaultAudience.
	Audiences []string
	// NodeProxies are the service accounts, as "namespace/name", that may ask on behalf of
	// the pods on their node: ztunnel's.
	NodeProxies []string
	// RenewWithCertificate accepts an unexpired X.509-SVID of this trust domain in place of
	// a token, for the same identity: for machines outside of the clusters. Entries then
	// have the namespace and the service account to go by, and nothing else.
	RenewWithCertificate bool
	// PreviousRoots are those of the CA that this one replaces. They go into answers with
	// the trust domain's own, so that both sides of a mesh that changes its CA accept each
	// other; whoever has their keys can name anybody there.
	PreviousRoots []*x509.Certificate
	Logger        *slog.Logger
	Registerer    prometheus.Registerer
}

// Issuer is the CA; *server.Server is one. It is called concurrently.
type Issuer interface {
	IssueDirect(ctx context.Context, d *server.Direct) (*server.DirectSVID, error)
	RefuseDirect(ctx context.Context, d *server.Direct, reason, detail string)
	DirectPeerOf(ctx context.Context) (server.DirectPeer, error)
}

// Cluster is a Kubernetes cluster, or another issuer of service account tokens.
type Cluster struct {
	// Name of the cluster in facts and records.
	Name string
	// Aliases are further names by which clients call it: the value of ISTIO_META_CLUSTER_ID.
	Aliases []string
	// Default: clients that name no cluster are of this one.
	Default bool
	// Issuer is the value of "iss" in tokens by which this one is chosen, whatever
	// cluster is named; empty for clusters that are chosen by name.
	Issuer string
	Tokens Tokens
	// Pods of the cluster. Without it, the token alone is believed until it expires, and
	// nobody may ask on behalf of others.
	Pods Pods
}

// Tokens verifies service account tokens. It is called concurrently.
type Tokens interface {
	// Verify says whose the token is. The error wraps ErrToken if it is not valid now, or
	// is for none of the audiences; any other error means that this cannot be said now.
	Verify(ctx context.Context, token string, audiences []string) (*Token, error)
}

// ErrToken is wrapped by the errors of Tokens about tokens that are not valid.
var ErrToken = errors.New("token is not valid")

// Token is what a service account token proves.
type Token struct {
	Namespace, ServiceAccount string
	// The pod that the token is bound to, and its node; empty where the issuer does not
	// say.
	PodName, PodUID, NodeName, NodeUID string
	// Expires is zero if that is not known.
	Expires time.Time
}

// Pods is what a cluster says of its pods. It answers from memory, and is called
// concurrently.
type Pods interface {
	// Pod returns the pod with this UID that has not ended. One that is not known yet is
	// waited for until ctx ends; the error then wraps ErrNoPod. Any other error means that
	// the cluster's word cannot be had now.
	Pod(ctx context.Context, uid string) (*Pod, error)
	// OnNode returns one pod of a service account that runs on a node, always the same one
	// while it runs, and waits as Pod does.
	OnNode(ctx context.Context, namespace, serviceAccount, node string) (*Pod, error)
}

// ErrNoPod is wrapped by the errors of Pods about pods that are not there.
var ErrNoPod = errors.New("there is no such pod")

// Pod is one pod. It is not modified.
type Pod struct {
	// Node is the name of the node that the pod runs on, NodeUID its UID; empty if the
	// cluster has not told of it yet.
	Node, NodeUID string
	// Facts are the namespace, service account, name, UID, labels, owner and images of the
	// pod as a whole.
	Facts *attributesv1.Kubernetes
}

// Times of a request.
const (
	// podWait is how long a pod is waited for that the cluster has not told of yet.
	podWait = time.Second
	// verifyTimeout bounds the verification of a token: the client's own patience is 10 s.
	verifyTimeout = 5 * time.Second
	// maxBackdate, together with a quarter of the life: ztunnel renews at half of the time
	// between notBefore and notAfter, and loops if most of that is before now.
	maxBackdate = 30 * time.Second
	// retrySoon is the longest time after which a retry helps that is part of the same
	// call: Istio's clients make five, after 0.1 to 1.6 s.
	retrySoon = 1500 * time.Millisecond
)

// Limits of what is verified at the same time, a quarter of it from one address.
const (
	maxVerifications = 256
	maxPodWaits      = 1024
)

// Service implements istio.v1.auth.IstioCertificateService. It may be called
// concurrently.
type Service struct {
	istiov1.UnimplementedIstioCertificateServiceServer
	cfg     Config
	log     *slog.Logger
	metrics *metrics

	byName   map[string]*Cluster
	byIssuer map[string]*Cluster
	fallback *Cluster // of clients that name no cluster; nil if there is none
	proxies  map[string]bool

	verdicts  *recent[[32]byte, verdict]
	verifying singleflight.Group
	refusals  *refusals
	verifiers *server.Places
	waiters   *server.Places
	patience  time.Duration // podWait, but in tests
	paces     *recent[[32]byte, *rate.Limiter]
	issueRate rate.Limit // a constant but in tests
}

// New returns a service that has to be registered with the server of DirectGRPC.
func New(cfg Config) (*Service, error) {
	if cfg.TrustDomain.IsZero() || cfg.Issuer == nil || cfg.Logger == nil || cfg.Registerer == nil {
		return nil, errors.New("make the CA for Istio: trust domain, issuer, logger and registerer are required")
	}
	if len(cfg.Audiences) == 0 {
		cfg.Audiences = []string{DefaultAudience}
	}
	s := &Service{
		cfg: cfg, log: cfg.Logger, byName: make(map[string]*Cluster), byIssuer: make(map[string]*Cluster), proxies: make(map[string]bool),
		verdicts: newRecent[[32]byte, verdict](maxVerdicts), refusals: newRefusals(),
		verifiers: server.NewPlaces(maxVerifications), waiters: server.NewPlaces(maxPodWaits), patience: podWait,
		paces: newRecent[[32]byte, *rate.Limiter](maxWorkloads), issueRate: issueRate,
	}
	for i := range cfg.Clusters {
		if err := s.add(&cfg.Clusters[i]); err != nil {
			return nil, fmt.Errorf("make the CA for Istio: %w", err)
		}
	}
	for _, account := range cfg.NodeProxies {
		if err := CheckServiceAccount(account); err != nil {
			return nil, fmt.Errorf("make the CA for Istio: %w", err)
		}
		s.proxies[account] = true
	}
	var err error
	if s.metrics, err = newMetrics(cfg.Registerer); err != nil {
		return nil, fmt.Errorf("make the CA for Istio: %w", err)
	}
	return s, nil
}

func (s *Service) add(c *Cluster) error {
	if c.Name == "" || c.Tokens == nil {
		return errors.New("a cluster has no name, or nobody to verify its tokens")
	}
	names := append([]string{c.Name}, c.Aliases...)
	if c.Issuer != "" {
		names = []string{c.Issuer}
	}
	index := s.byName
	if c.Issuer != "" {
		index = s.byIssuer
	}
	for _, name := range names {
		if other, taken := index[name]; taken && other != c {
			return fmt.Errorf("%q names both %s and %s", name, other.Name, c.Name)
		}
		index[name] = c
	}
	if c.Default {
		if s.fallback != nil {
			return fmt.Errorf("clients that name no cluster cannot be of both %s and %s", s.fallback.Name, c.Name)
		}
		s.fallback = c
	}
	return nil
}

// CheckServiceAccount checks a service account written as "namespace/name".
func CheckServiceAccount(account string) error {
	namespace, name, ok := strings.Cut(account, "/")
	if !ok || namespace == "" || name == "" || strings.Contains(name, "/") {
		return fmt.Errorf("%.100q is no service account: write namespace/name, such as istio-system/ztunnel", account)
	}
	return nil
}

// CreateCertificate implements istiov1.IstioCertificateServiceServer.
func (s *Service) CreateCertificate(ctx context.Context, req *istiov1.IstioCertificateRequest) (*istiov1.IstioCertificateResponse, error) {
	began := time.Now()
	r := &request{s: s, impersonated: impersonatedIdentity(req)}
	chain, err := r.serve(ctx, req)
	s.metrics.duration.Observe(time.Since(began).Seconds())
	if err != nil {
		refusal := r.refused(err)
		s.metrics.requests.WithLabelValues(outcomeOf(refusal.code)).Inc()
		s.log.DebugContext(ctx, "certificate refused", "address", r.peer.Address, "spiffe_id", r.id, "code", refusal.code.String(), "err", err)
		return nil, status.Error(refusal.code, refusal.text)
	}
	s.metrics.requests.WithLabelValues(outcomeIssued).Inc()
	return &istiov1.IstioCertificateResponse{CertChain: chain}, nil
}

// request is one request on its way.
type request struct {
	s    *Service
	peer server.DirectPeer
	// impersonated is the SPIFFE ID that a node's proxy asks for; empty if it asks for
	// itself.
	impersonated string

	proof
	cluster *Cluster // nil with a certificate
	caller  *Token   // nil with a certificate
	// identified is set when it is known who calls.
	identified bool
	node       *attributesv1.Node
	id         string // that is asked for
	actor      string
	facts      *attributesv1.Kubernetes
}

func (r *request) serve(ctx context.Context, req *istiov1.IstioCertificateRequest) ([]string, error) {
	if err := r.identify(ctx); err != nil {
		return nil, err
	}
	r.identified = true
	if err := r.choose(ctx); err != nil {
		return nil, err
	}
	csr, err := parseRequest(req, r.id)
	if err != nil {
		return nil, err
	}
	if err := r.pace(); err != nil {
		return nil, err
	}
	svid, err := r.s.cfg.Issuer.IssueDirect(ctx, &server.Direct{
		Node: r.node, Workload: &attributesv1.Workload{K8S: r.facts}, Instance: r.instance(), SPIFFEID: r.id, CSR: csr,
		TTL: lifeOf(req), Backdate: maxBackdate, Actor: r.actor, Address: r.peer.Address,
	})
	if err != nil {
		return nil, issueRefusal(err)
	}
	r.s.refusals.forget(r.key(), r.subjectKey())
	return encodeChain(svid, r.s.cfg.PreviousRoots), nil
}

// instance is what the key belongs to.
func (r *request) instance() string {
	if uid := r.facts.GetPodUid(); uid != "" {
		return "k8s:" + uid
	}
	return "istio:" + r.id
}

// refused records a refusal that nobody has recorded yet, and remembers those that a
// retry does not change.
func (r *request) refused(err error) *refusal {
	var refused *refusal
	if !errors.As(err, &refused) {
		refused = &refusal{code: codes.Internal, text: "internal error"}
	}
	if refused.again {
		return refused
	}
	if refused.record != "" {
		d := &server.Direct{Node: r.node, SPIFFEID: r.id, Actor: r.actor, Address: r.peer.Address}
		if r.facts != nil {
			d.Workload, d.Instance = &attributesv1.Workload{K8S: r.facts}, r.instance()
		}
		ctx, cancel := context.WithTimeout(context.Background(), verifyTimeout) // the caller may have gone
		defer cancel()
		r.s.cfg.Issuer.RefuseDirect(ctx, d, refused.record, refused.detail)
	}
	if !slices.Contains([]codes.Code{codes.Unauthenticated, codes.PermissionDenied, codes.InvalidArgument}, refused.code) {
		return refused
	}
	if r.identified {
		r.s.refusals.note(r.subjectKey(), refused)
	} else if r.token != "" {
		r.s.refusals.note(r.key(), refused)
	}
	return refused
}
