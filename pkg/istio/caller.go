package istio

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"

	"github.com/meshid/meshid/pkg/server"
)

// Limits of what a caller shows.
const (
	maxToken     = 16 << 10
	maxClusterID = 253
	// maxVerdicts bounds the cache: some 20 MB.
	maxVerdicts = 1 << 16
	// verdictLife is how long a token is believed without asking the cluster again. A pod
	// that has gone ends it at once.
	verdictLife = time.Minute
)

// proof is what a caller shows to prove who it is.
type proof struct {
	token       string
	clusterID   string
	certificate spiffeid.ID // zero without one
}

// verdict is what became of a token.
type verdict struct {
	token *Token
	until time.Time
}

// identify finds out who calls.
func (r *request) identify(ctx context.Context) error {
	peer, err := r.s.cfg.Issuer.DirectPeerOf(ctx)
	r.peer = peer
	if err != nil {
		return &refusal{code: codes.Unauthenticated, text: "the client certificate is not accepted", detail: err.Error(), record: server.DirectCredentials}
	}
	if err := r.read(ctx); err != nil {
		return err
	}
	if r.token == "" {
		return r.byCertificate()
	}
	if err := r.s.refusals.check(r.key(), r.subjectKey()); err != nil {
		return err
	}
	if r.cluster = r.s.clusterOf(&r.proof); r.cluster == nil {
		return &refusal{
			code: codes.Unauthenticated, text: fmt.Sprintf("the cluster %.100q is not one of this CA's: name it in the configuration, or set ISTIO_META_CLUSTER_ID", r.clusterID),
			detail: fmt.Sprintf("cluster %.100q", r.clusterID), record: server.DirectCredentials,
		}
	}
	if r.caller, err = r.verify(ctx); err != nil {
		return err
	}
	return r.callersPod(ctx)
}

// read takes the credentials from the metadata of a call.
func (c *proof) read(ctx context.Context) error {
	md, _ := metadata.FromIncomingContext(ctx)
	bad := func(text string) error {
		return &refusal{code: codes.Unauthenticated, text: text, detail: text, record: server.DirectCredentials}
	}
	ids := md.Get("clusterid")
	if len(ids) > 1 || len(ids) == 1 && len(ids[0]) > maxClusterID {
		return bad("the header clusterid is there twice, or too long")
	}
	if len(ids) == 1 {
		c.clusterID = ids[0]
	}
	headers := md.Get("authorization")
	if len(headers) == 0 {
		return nil
	}
	scheme, token, ok := strings.Cut(headers[0], " ")
	if len(headers) > 1 || !ok || !strings.EqualFold(scheme, "bearer") || token == "" || len(token) > maxToken {
		return bad("the header authorization is not one bearer token")
	}
	c.token = token
	return nil
}

// key is the hash by which the caller's token is remembered.
func (c *proof) key() [32]byte { return hashOf("token", c.clusterID, c.token) }

// subjectKey is that of the token, or certificate, together with what it asks for.
func (r *request) subjectKey() [32]byte {
	return hashOf("subject", r.clusterID, r.token, r.certificate.String(), r.impersonated)
}

func hashOf(parts ...string) [32]byte {
	h := sha256.New()
	for _, part := range parts {
		sum := sha256.Sum256([]byte(part)) // so that no two lists of parts read alike
		h.Write(sum[:])
	}
	return [32]byte(h.Sum(nil))
}

// clusterOf returns whose token it is: that of the issuer that the token itself names,
// if it was configured by that, or that which the client names; nil if there is none. The
// token is not believed: it is verified by the one that is returned.
func (s *Service) clusterOf(c *proof) *Cluster {
	if len(s.byIssuer) > 0 {
		if cluster, ok := s.byIssuer[claimedIssuer(c.token)]; ok {
			return cluster
		}
	}
	if c.clusterID == "" {
		return s.fallback
	}
	return s.byName[c.clusterID]
}

// claimedIssuer is what a token says of its issuer.
func claimedIssuer(token string) string {
	parts := strings.SplitN(token, ".", 4)
	if len(parts) != 3 {
		return ""
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return ""
	}
	var claims struct {
		Issuer string `json:"iss"`
	}
	if json.Unmarshal(payload, &claims) != nil {
		return ""
	}
	return claims.Issuer
}

// verify says whose the token is. Of one token there is one verification at a time, and
// its good verdict is kept for a moment.
func (r *request) verify(ctx context.Context) (*Token, error) {
	s, key, now := r.s, r.key(), time.Now()
	if v, ok := s.verdicts.get(key); ok && now.Before(v.until) {
		s.metrics.tokens.WithLabelValues(tokenCached).Inc()
		return v.token, nil
	}
	if err := s.refusals.admit(r.peer.Host); err != nil {
		return nil, err
	}
	answer, err, _ := s.verifying.Do(string(key[:]), func() (any, error) {
		release, ok := s.verifiers.Take(r.peer.Host)
		if !ok {
			return nil, errBusy
		}
		defer release()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), verifyTimeout) // others may wait for it
		defer cancel()
		token, err := r.cluster.Tokens.Verify(ctx, r.token, s.cfg.Audiences)
		if err != nil {
			return nil, err
		}
		until := now.Add(verdictLife)
		if !token.Expires.IsZero() && token.Expires.Before(until) {
			until = token.Expires
		}
		s.verdicts.put(key, verdict{token: token, until: until})
		return token, nil
	})
	token, ok := answer.(*Token)
	switch {
	case err == nil && ok:
		s.metrics.tokens.WithLabelValues(tokenVerified).Inc()
		return token, nil
	case errors.Is(err, errBusy):
		return nil, &refusal{code: codes.ResourceExhausted, text: "too many tokens are being verified: try again"}
	case errors.Is(err, ErrToken):
		s.metrics.tokens.WithLabelValues(tokenRefused).Inc()
		s.refusals.strike(r.peer.Host)
		return nil, &refusal{
			code: codes.Unauthenticated, text: "the token is not accepted: the CA's ledger says why",
			detail: err.Error(), record: server.DirectCredentials,
		}
	default:
		s.metrics.tokens.WithLabelValues(tokenError).Inc()
		s.log.WarnContext(ctx, "token cannot be verified", "cluster", r.cluster.Name, "err", err)
		return nil, &refusal{code: codes.Unavailable, text: "the token cannot be verified now"}
	}
}

var errBusy = errors.New("too many verifications")

// callersPod finds the pod that the token is bound to, and the node that it runs on. It
// is asked for at each request, also if the token's verdict is remembered: a token may
// be good for some time after its pod has gone.
func (r *request) callersPod(ctx context.Context) error {
	t := r.caller
	r.actor = spiffeIDOf(r.s.cfg.TrustDomain, t.Namespace, t.ServiceAccount)
	r.node = &attributesv1.Node{Method: Method, Id: r.cluster.Name, K8S: &attributesv1.K8SNode{
		Cluster: r.cluster.Name, Name: t.NodeName, Uid: t.NodeUID,
		Namespace: t.Namespace, ServiceAccount: t.ServiceAccount, PodName: t.PodName, PodUid: t.PodUID,
	}}
	r.facts = &attributesv1.Kubernetes{Namespace: t.Namespace, ServiceAccount: t.ServiceAccount, PodName: t.PodName, PodUid: t.PodUID}
	if r.cluster.Pods != nil {
		pod, err := r.wait(ctx, func(ctx context.Context) (*Pod, error) { return r.cluster.Pods.Pod(ctx, t.PodUID) })
		switch {
		case errors.Is(err, ErrNoPod):
			return &refusal{
				code: codes.Unauthenticated, text: "the token's pod is not running: the CA's ledger says more",
				detail: fmt.Sprintf("pod %s/%s with UID %s is not in the cluster", t.Namespace, t.PodName, t.PodUID), record: server.DirectCredentials,
			}
		case err != nil:
			return err
		case pod.Facts.GetNamespace() != t.Namespace || pod.Facts.GetServiceAccount() != t.ServiceAccount ||
			t.PodName != "" && pod.Facts.GetPodName() != t.PodName || t.NodeName != "" && pod.Node != t.NodeName || t.NodeUID != "" && pod.NodeUID != "" && pod.NodeUID != t.NodeUID:
			return &refusal{
				code: codes.Unauthenticated, text: "the token does not fit its pod: the CA's ledger says more",
				detail: fmt.Sprintf("the token is of %s/%s, pod %s on node %s; the pod is of %s/%s, %s on node %s", t.Namespace, t.ServiceAccount, t.PodName, t.NodeName,
					pod.Facts.GetNamespace(), pod.Facts.GetServiceAccount(), pod.Facts.GetPodName(), pod.Node), record: server.DirectCredentials,
			}
		}
		r.facts, r.node.K8S.Name, r.node.K8S.PodName = pod.Facts, pod.Node, pod.Facts.GetPodName()
		if t.NodeUID == "" {
			r.node.K8S.Uid = pod.NodeUID
		}
	}
	// As k8s_psat names nodes, so that a ban of one is a ban of its pods too.
	if uid := r.node.GetK8S().GetUid(); uid != "" {
		r.node.Id = r.cluster.Name + "." + uid
	}
	return nil
}

// wait asks the cluster for a pod. What is not known yet is waited for for a moment, by
// a bounded number of callers.
func (r *request) wait(ctx context.Context, ask func(context.Context) (*Pod, error)) (*Pod, error) {
	known, cancel := context.WithCancel(ctx)
	cancel() // answers from memory
	pod, err := ask(known)
	if errors.Is(err, ErrNoPod) && ctx.Err() == nil {
		release, ok := r.s.waiters.Take(r.peer.Host)
		if !ok {
			return nil, &refusal{code: codes.ResourceExhausted, text: "too many pods are being waited for: try again"}
		}
		defer release()
		patient, cancel := context.WithTimeout(ctx, r.s.patience)
		defer cancel()
		pod, err = ask(patient)
	}
	switch {
	case err == nil:
		return pod, nil
	case ctx.Err() != nil:
		return nil, &refusal{code: codes.Canceled, text: "the call was given up"}
	case errors.Is(err, ErrNoPod):
		return nil, err
	default:
		r.s.log.WarnContext(ctx, "pods of the cluster cannot be looked up", "cluster", r.cluster.Name, "err", err)
		return nil, &refusal{code: codes.Unavailable, text: "the pods of the cluster are not known now"}
	}
}

// byCertificate is identify for a caller without a token.
func (r *request) byCertificate() error {
	if r.peer.ID.IsZero() || !r.s.cfg.RenewWithCertificate {
		const text = "a bearer token of a service account is required"
		return &refusal{code: codes.Unauthenticated, text: text, detail: text, record: server.DirectCredentials}
	}
	r.certificate = r.peer.ID
	if err := r.s.refusals.check(r.subjectKey()); err != nil {
		return err
	}
	namespace, account, err := parseIdentity(r.s.cfg.TrustDomain, r.certificate.String())
	if err != nil {
		return &refusal{code: codes.Unauthenticated, text: "the client certificate is not of a service account", detail: err.Error(), record: server.DirectCredentials}
	}
	r.actor = r.certificate.String()
	r.node = &attributesv1.Node{Method: Method, Id: certificateNode}
	r.facts = &attributesv1.Kubernetes{Namespace: namespace, ServiceAccount: account}
	return nil
}

// certificateNode stands for the node of those who come with a certificate: it is not
// known.
const certificateNode = "certificate"
