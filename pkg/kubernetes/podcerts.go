package kubernetes

// The path of a PodCertificateRequest, each step one function, in this order:
//
//  1. Set       the object is there: one goroutine looks after it until it is answered
//  2. stagger   CAs that follow the same cluster do not sign all at the same moment
//  3. checkKey  key type, proof of possession and annotations of the request
//  4. checkPod  its pod, node and service account are what the cluster says they are
//  5. issue     server.IssueDirect: entries, limits, signature, durable record
//  6. write     the status, unless another one was written first
//
// An answer is final: the kubelet never asks again for a pod that was denied, or failed.
// So what may be over soon is tried again while the request is pending.

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"

	"github.com/meshid/meshid/internal/backoff"
	"github.com/meshid/meshid/internal/kube"
	"github.com/meshid/meshid/pkg/placement"
	"github.com/meshid/meshid/pkg/server"
)

// PodCertificateMethod is the node attestation method in the facts of nodes whose
// kubelets ask: the API server knows them.
const PodCertificateMethod = "pod_certificate"

// SPIFFEIDAnnotation chooses among the identities that entries give to a pod, in the
// userAnnotations of its volume.
const SPIFFEIDAnnotation = "meshid.io/spiffe-id"

const (
	podCertificates = "podcertificaterequests"
	// maxPending bounds the requests that are looked after at the same time. What is
	// beyond it is read again when half of them are answered.
	maxPending = 4096
	// maxSigning bounds those of them that are issued and written at the same time: what
	// waits may be answered by another CA meanwhile.
	maxSigning = 8
	// secondLook is how old a request is at least before it is denied for what the
	// cluster or another CA may have said already, and this one has not heard yet.
	secondLook = 3 * time.Second
	// maxStagger is how long a CA leaves a request to the others. The kubelet looks for
	// the answer every half second at most.
	maxStagger = 200 * time.Millisecond
	// perWaiting is how much longer that may be for each request that waits already: they
	// are not answered faster, see the limit of internal/kube.
	perWaiting = 10 * time.Millisecond
	// podBackdate is how far notBefore lies in the past: the API server wants it within
	// five minutes of its own clock.
	podBackdate = time.Minute
	// The API server wants that a certificate lives for an hour or more, and is not to be
	// renewed in the first and the last ten minutes.
	minPodLife, refreshMargin = time.Hour, 10 * time.Minute
	// defaultPodLife is what the API server writes if the pod does not say.
	defaultPodLife = 24 * time.Hour
)

// Issuer issues to workloads without an agent; *server.Server is one. It is called
// concurrently.
type Issuer interface {
	IssueDirect(ctx context.Context, d *server.Direct) (*server.DirectSVID, error)
	RefuseDirect(ctx context.Context, d *server.Direct, reason, detail string)
}

// PodCertificatesConfig is what NewPodCertificates needs.
type PodCertificatesConfig struct {
	// Client is that of the cluster. It may get, list and watch
	// podcertificaterequests, patch their status, and sign for the signer.
	Client *kube.Client
	// Pods are those of the cluster; the caller runs them. If Strict, requests wait while the
	// cluster cannot be heard, also those of pods that were seen before.
	Pods   *kube.Pods
	Strict bool
	// Signer is the name by which pods ask for this CA, such as "meshid.io/svid".
	Signer string
	// Instance is the name of this CA process.
	Instance   string
	Issuer     Issuer
	Logger     *slog.Logger
	Registerer prometheus.Registerer
	// Report is called with what is wrong, and with "" when all is well. It may be nil.
	Report func(problem string)
}

// PodCertificates answers the PodCertificateRequest objects of one cluster for one signer.
type PodCertificates struct {
	cfg     PodCertificatesConfig
	metrics *podMetrics
	slots   chan struct{}
	// waker is woken when there is room for requests that were left out.
	waker waker

	mu       sync.Mutex // guards what follows
	path     kube.Path
	pending  map[string]*podRequest // by UID
	missed   bool                   // some were left out for want of room
	rejected error                  // why the last status was not accepted
}

// podCertificateRequest is an object of the kind PodCertificateRequest. Its older
// versions have a public key and a proof in place of the PKCS #10 request.
type podCertificateRequest struct {
	kube.Object
	Spec struct {
		SignerName                string            `json:"signerName"`
		PodName                   string            `json:"podName"`
		PodUID                    string            `json:"podUID"`
		ServiceAccountName        string            `json:"serviceAccountName"`
		NodeName                  string            `json:"nodeName"`
		NodeUID                   string            `json:"nodeUID"`
		MaxExpirationSeconds      *int32            `json:"maxExpirationSeconds"`
		StubPKCS10Request         []byte            `json:"stubPKCS10Request"`
		PKIXPublicKey             []byte            `json:"pkixPublicKey"`
		ProofOfPossession         []byte            `json:"proofOfPossession"`
		UnverifiedUserAnnotations map[string]string `json:"unverifiedUserAnnotations"`
	} `json:"spec"`
	Status podCertificateStatus `json:"status"`
}

type podCertificateStatus struct {
	Conditions       []condition `json:"conditions"`
	CertificateChain string      `json:"certificateChain,omitempty"`
	NotBefore        string      `json:"notBefore,omitempty"`
	BeginRefreshAt   string      `json:"beginRefreshAt,omitempty"`
	NotAfter         string      `json:"notAfter,omitempty"`
}

// Conditions of a PodCertificateRequest; each of them is final.
const (
	conditionIssued = "Issued"
	conditionDenied = "Denied"
	conditionFailed = "Failed"
)

func (o *podCertificateRequest) answered() bool {
	return slices.ContainsFunc(o.Status.Conditions, func(c condition) bool {
		return c.Type == conditionIssued || c.Type == conditionDenied || c.Type == conditionFailed
	})
}

// podRequest is a request on its way.
type podRequest struct {
	*podCertificateRequest
	seen   time.Time
	first  time.Duration // until the first attempt
	cancel context.CancelFunc
	answer *podAnswer // nil until there is one
}

// NewPodCertificates returns what Run has to be called on.
func NewPodCertificates(cfg PodCertificatesConfig) (*PodCertificates, error) {
	if cfg.Report == nil {
		cfg.Report = func(string) {}
	}
	p := &PodCertificates{
		cfg: cfg, slots: make(chan struct{}, maxSigning), waker: newWaker(), pending: make(map[string]*podRequest),
	}
	var err error
	p.metrics, err = newPodMetrics(cfg.Client.Name(), cfg.Registerer, p.length)
	return p, err
}

func (p *PodCertificates) length() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.pending)
}

// Run answers requests until ctx ends.
func (p *PodCertificates) Run(ctx context.Context) error {
	var requests sync.WaitGroup
	defer requests.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for {
		again := recheck
		resource, err := CertificatesResource(ctx, p.cfg.Client, podCertificates)
		if errors.Is(err, kube.ErrNotFound) {
			err = errNoAPI
		}
		if err == nil {
			p.follow(ctx, &requests, resource)
			again = 0
		} else if !errors.Is(err, errNoAPI) {
			again = retry
		}
		if err != nil && ctx.Err() == nil {
			p.cfg.Report(fmt.Sprintf("the PodCertificateRequest objects of cluster %s cannot be read: %v", p.cfg.Client.Name(), err))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(again):
		}
	}
}

var errNoAPI = errors.New("the API server does not have this kind: Kubernetes 1.37 has, and 1.34 and newer with the feature gate PodCertificateRequest; or remove the setting")

// follow answers requests until ctx ends, the server does not have this version any more,
// or there is room for those that were left out.
func (p *PodCertificates) follow(ctx context.Context, requests *sync.WaitGroup, resource kube.Resource) {
	p.mu.Lock()
	p.path = kube.Path{Resource: resource}
	p.missed = false
	p.mu.Unlock()
	following, cancel := context.WithCancel(ctx)
	reader := podRequests{p, func(r *podRequest) {
		var own context.Context
		own, r.cancel = context.WithCancel(ctx)
		requests.Go(func() { p.serve(ctx, own, r) })
	}}
	feed := kube.Follow(p.cfg.Client, kube.Path{Resource: resource}, kube.FollowOptions{Fields: "spec.signerName=" + p.cfg.Signer},
		func(o *podCertificateRequest) *podCertificateRequest { return o }, kube.Reader[*podCertificateRequest](reader))
	defer cancel()
	p.waker.wake()
	loop(following, p.waker, 0, func(context.Context) time.Duration {
		if !p.check(feed.State()) {
			cancel()
		}
		return progress
	}, feed)
}

// check reports how the requests are followed, and says whether that goes on.
func (p *PodCertificates) check(feed kube.FeedState) bool {
	p.mu.Lock()
	rejected, room := p.rejected, p.missed && len(p.pending) <= maxPending/2
	p.mu.Unlock()
	_, why := feed.Behind(time.Now())
	if room || errors.Is(why, kube.ErrNotFound) {
		return false
	}
	switch {
	case why != nil && !errors.Is(why, kube.ErrReading):
		p.cfg.Report(fmt.Sprintf("the PodCertificateRequest objects of cluster %s cannot be read: %v", p.cfg.Client.Name(), why))
	case rejected != nil:
		p.cfg.Report(fmt.Sprintf("a PodCertificateRequest of cluster %s cannot be answered: %v", p.cfg.Client.Name(), rejected))
	default:
		p.cfg.Report("")
	}
	return true
}

// podRequests is the Reader of the requests.
type podRequests struct {
	*PodCertificates
	start func(r *podRequest)
}

// Set implements kube.Reader.
func (r podRequests) Set(o *podCertificateRequest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	known := r.pending[o.Metadata.UID]
	switch {
	case o.answered() || o.Metadata.DeletionTimestamp != nil:
		if known != nil {
			known.cancel()
		}
	case known != nil || o.Spec.SignerName != r.cfg.Signer:
	case len(r.pending) >= maxPending:
		r.missed = true
	default:
		request := &podRequest{podCertificateRequest: o, seen: time.Now(), first: r.stagger(o.Metadata.UID, len(r.pending))}
		r.pending[o.Metadata.UID] = request
		r.start(request)
	}
}

// Delete implements kube.Reader.
func (r podRequests) Delete(o *podCertificateRequest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if known := r.pending[o.Metadata.UID]; known != nil {
		known.cancel()
	}
}

// Replace implements kube.Reader.
func (r podRequests) Replace(all []*podCertificateRequest) {
	there := make(map[string]bool, len(all))
	for _, o := range all {
		there[o.Metadata.UID] = true
		r.Set(o)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for uid, request := range r.pending {
		if !there[uid] {
			request.cancel()
		}
	}
}

// end forgets a request.
func (p *PodCertificates) end(r *podRequest) {
	r.cancel()
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.pending, r.Metadata.UID)
	if p.missed && len(p.pending) <= maxPending/2 {
		p.waker.wake()
	}
}

// podAnswer is what is written into the status of a request.
type podAnswer struct {
	outcome string
	status  podCertificateStatus
}

// denial is why a request is denied.
type denial struct {
	reason, message string
	// hasty: it may be that this CA has not heard yet of what would change it.
	hasty bool
	// record is the reason to record it with; empty if it has been recorded.
	record string
}

func (d *denial) Error() string { return d.message }

// later says why a request cannot be answered yet.
type later struct {
	why   string
	after time.Duration // zero: as often as it has been tried
}

func (l *later) Error() string { return l.why }

// serve looks after a request until it is answered. ctx ends with the CA, own also when
// the request needs no answer any more.
func (p *PodCertificates) serve(ctx, own context.Context, r *podRequest) {
	defer p.end(r)
	pause := backoff.New(backoff.Policy{Base: 100 * time.Millisecond, Max: 15 * time.Second})
	for wait := r.first; ; {
		select {
		case <-own.Done():
			outcome := outcomeGone
			if r.answer != nil && r.answer.outcome == outcomeIssued {
				outcome = outcomeLost
			}
			p.finish(ctx, r, outcome)
			return
		case <-time.After(wait):
		}
		outcome, err := p.attempt(ctx, own, r)
		if outcome != "" {
			p.finish(ctx, r, outcome)
			return
		}
		wait = pause.Next()
		if l, ok := errors.AsType[*later](err); ok && l.after > 0 {
			wait = l.after
		}
		if own.Err() == nil {
			p.cfg.Logger.DebugContext(ctx, "a pod certificate has to wait", "cluster", p.cfg.Client.Name(), "request", r.name(), "err", err, "took", time.Since(r.seen))
		}
	}
}

// attempt tries to answer a request. The outcome is empty if that is to be tried again.
func (p *PodCertificates) attempt(ctx, own context.Context, r *podRequest) (outcome string, err error) {
	var d *server.Direct
	if r.answer == nil {
		d = p.direct(r)
		if err = r.checkKey(d); err == nil {
			err = p.checkPod(own, r, d)
		}
	}
	select {
	case p.slots <- struct{}{}:
		defer func() { <-p.slots }()
	case <-own.Done():
	}
	if own.Err() != nil {
		return "", own.Err()
	}
	if r.answer == nil && err == nil {
		r.answer, err = p.issue(own, d)
	}
	if refused, ok := errors.AsType[*denial](err); ok {
		r.answer, err = p.deny(own, r, d, refused)
	}
	if r.answer == nil {
		return "", err
	}
	// Of our own answer we may hear before the call has returned.
	outcome, err = p.write(ctx, r)
	if errors.Is(err, kube.ErrInvalid) && r.answer.outcome == outcomeIssued {
		r.answer = refusalOf(conditionFailed, "NotAccepted", "the API server does not accept the certificate, are the clocks right? "+err.Error())
		return p.write(ctx, r)
	}
	return outcome, err
}

// stagger is how long a request is left to other CAs: another time for each of them. Who
// comes later finds it answered, most often. What comes while others wait is spread over
// the time that those take.
func (p *PodCertificates) stagger(uid string, waiting int) time.Duration {
	h := fnv.New64a()
	_, _ = h.Write([]byte(p.cfg.Instance + "\x00" + uid)) // never fails
	longest := maxStagger + time.Duration(waiting)*perWaiting
	return time.Duration(h.Sum64() % uint64(longest)) //nolint:gosec // less than longest
}

func (r *podRequest) name() string { return r.Metadata.Namespace + "/" + r.Metadata.Name }

func (p *PodCertificates) finish(ctx context.Context, r *podRequest, outcome string) {
	if ctx.Err() != nil {
		return // the CA ends, and another one goes on
	}
	took := time.Since(r.seen)
	p.metrics.requests.WithLabelValues(outcome).Inc()
	if outcome != outcomeGone && outcome != outcomeLost {
		p.metrics.duration.Observe(took.Seconds())
	}
	p.cfg.Logger.DebugContext(ctx, "a pod certificate was answered", "cluster", p.cfg.Client.Name(), "request", r.name(), "outcome", outcome, "took", took)
}

// direct is what a request says, before anything of it is known to be true.
func (p *PodCertificates) direct(r *podRequest) *server.Direct {
	d := &server.Direct{
		Node: &attributesv1.Node{
			Method: PodCertificateMethod, Id: p.cfg.Client.Name() + "." + r.Spec.NodeUID,
			K8S: &attributesv1.K8SNode{Cluster: p.cfg.Client.Name(), Name: r.Spec.NodeName, Uid: r.Spec.NodeUID},
		},
		Workload: &attributesv1.Workload{K8S: &attributesv1.Kubernetes{
			Namespace: r.Metadata.Namespace, ServiceAccount: r.Spec.ServiceAccountName, PodName: r.Spec.PodName, PodUid: r.Spec.PodUID,
		}},
		Instance: "k8s:" + r.Spec.PodUID,
		Actor:    "PodCertificateRequest " + r.name(),
		AnyID:    true, Backdate: podBackdate, MinLife: minPodLife, MaxLife: defaultPodLife,
	}
	if seconds := r.Spec.MaxExpirationSeconds; seconds != nil {
		d.MaxLife = time.Duration(*seconds) * time.Second
	}
	return d
}

// deny answers with a denial, once it is final.
func (p *PodCertificates) deny(ctx context.Context, r *podRequest, d *server.Direct, refused *denial) (*podAnswer, error) {
	if wait := time.Until(r.seen.Add(secondLook)); refused.hasty && wait > 0 {
		return nil, &later{refused.message, wait}
	}
	if refused.record != "" {
		d.Node.Id = "" // nobody has verified which node it is
		p.cfg.Issuer.RefuseDirect(ctx, d, refused.record, refused.message)
	}
	return refusalOf(conditionDenied, refused.reason, refused.message), nil
}

// checkPod compares what the request says with what the cluster says of the pod, and
// takes the pod's facts from there. The API server has compared it too, if it was a
// kubelet that made the request; others may have the right to make requests.
func (p *PodCertificates) checkPod(ctx context.Context, r *podRequest, d *server.Direct) error {
	wrong := func(hasty bool, format string, args ...any) error {
		return &denial{reason: "PodMismatch", message: fmt.Sprintf(format, args...), hasty: hasty, record: server.DirectPlacement}
	}
	spec := &r.Spec
	ctx, cancel := context.WithDeadline(ctx, r.seen.Add(secondLook))
	defer cancel()
	pod, deleted := p.cfg.Pods.AwaitPod(ctx, spec.NodeName, spec.PodUID, func(pod *kube.Pod) bool { return pod.Node() != "" })
	// What this CA has not heard of is wrong only if it hears everything.
	unheard := func(format string, args ...any) error {
		if _, behind := p.cfg.Pods.Behind(time.Now()); behind != nil {
			return &later{why: "pods and nodes of the cluster are not known: " + behind.Error()}
		}
		return wrong(true, format, args...)
	}
	switch {
	case deleted:
		return wrong(false, "pod %s was deleted", spec.PodUID)
	case pod == nil || pod.Node() == "":
		return unheard("there is no pod %s on node %s", spec.PodUID, spec.NodeName)
	case pod.UID != spec.PodUID || pod.Name != spec.PodName || pod.Namespace() != r.Metadata.Namespace:
		return wrong(false, "pod %s is not %s/%s", spec.PodUID, r.Metadata.Namespace, spec.PodName)
	case pod.Node() != spec.NodeName:
		return wrong(false, "pod %s is not on node %s", spec.PodUID, spec.NodeName)
	case pod.ServiceAccount() != spec.ServiceAccountName || spec.ServiceAccountName == "":
		return wrong(false, "pod %s does not have the service account %s", spec.PodUID, spec.ServiceAccountName)
	case pod.Over(time.Now()):
		return wrong(false, "pod %s has ended", spec.PodUID)
	}
	if uid := p.cfg.Pods.AwaitNode(ctx, spec.NodeName); uid != spec.NodeUID || uid == "" {
		return unheard("node %s does not have the UID %s", spec.NodeName, spec.NodeUID)
	}
	if _, behind := p.cfg.Pods.Behind(time.Now()); behind != nil && p.cfg.Strict {
		return &later{why: "the cluster cannot be heard: " + behind.Error()}
	}
	d.Workload.K8S = placement.Facts(pod)
	return nil
}

// issue asks the CA.
func (p *PodCertificates) issue(ctx context.Context, d *server.Direct) (*podAnswer, error) {
	svid, err := p.cfg.Issuer.IssueDirect(ctx, d)
	if err != nil {
		return nil, refusedBy(err)
	}
	return issued(svid)
}

// write writes the answer, unless the request has been answered, or has gone: outcome
// says what became of it, and is empty if that is to be tried again.
func (p *PodCertificates) write(ctx context.Context, r *podRequest) (outcome string, err error) {
	answer := r.answer
	p.mu.Lock()
	path := p.path
	p.mu.Unlock()
	path.Namespace, path.Name = r.Metadata.Namespace, r.Metadata.Name
	status := path
	status.Subresource = "status"
	err = p.cfg.Client.Merge(ctx, status, map[string]any{
		"metadata": map[string]any{"resourceVersion": r.Metadata.ResourceVersion, "uid": r.Metadata.UID},
		"status":   answer.status,
	}, nil)
	switch {
	case err == nil:
		if answer.outcome != outcomeFailed {
			p.accepted(nil)
		}
		return answer.outcome, nil
	case errors.Is(err, kube.ErrConflict):
		var now podCertificateRequest
		if err = p.cfg.Client.Get(ctx, path, &now); err == nil && now.Metadata.UID == r.Metadata.UID && !now.answered() {
			// Something else of it has changed.
			r.Metadata.ResourceVersion = now.Metadata.ResourceVersion
			return "", &later{why: "the request has changed", after: time.Millisecond}
		}
		if err == nil && answer.outcome == outcomeIssued && now.Metadata.UID == r.Metadata.UID {
			return outcomeLost, nil
		}
	}
	switch {
	case err == nil, errors.Is(err, kube.ErrNotFound):
		return outcomeGone, nil
	case errors.Is(err, kube.ErrDenied), errors.Is(err, kube.ErrInvalid):
		p.accepted(err)
	}
	return "", err
}

// accepted remembers whether the API server accepts our answers.
func (p *PodCertificates) accepted(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rejected = err
}
