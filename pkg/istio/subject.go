package istio

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"

	istiov1 "github.com/meshid/meshid/proto/istio/v1"

	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/pkg/server"
)

// keyImpersonated is the key of the request's metadata by which a node's proxy says
// whose identity it asks for.
const keyImpersonated = "ImpersonatedIdentity"

// impersonatedIdentity is what a node's proxy asks for; empty if the key is not there.
// A value that is no string is no identity.
func impersonatedIdentity(req *istiov1.IstioCertificateRequest) string {
	value, ok := req.GetMetadata().GetFields()[keyImpersonated]
	if !ok {
		return ""
	}
	if text := value.GetStringValue(); text != "" {
		return text
	}
	return "(none)" // it was asked for something, and that is no identity
}

// spiffeIDOf is Istio's name of a service account.
func spiffeIDOf(td spiffeid.TrustDomain, namespace, serviceAccount string) string {
	return "spiffe://" + td.Name() + "/ns/" + namespace + "/sa/" + serviceAccount
}

// parseIdentity takes Istio's name of a service account apart: a trust domain, which must
// be ours, "ns", the namespace, "sa" and the account, and nothing else.
func parseIdentity(td spiffeid.TrustDomain, text string) (namespace, serviceAccount string, err error) {
	id, err := identity.ParseID(text)
	if err != nil {
		return "", "", err
	}
	if id.TrustDomain() != td {
		return "", "", fmt.Errorf("%s is not of the trust domain %s", id, td.Name())
	}
	segments := strings.Split(strings.TrimPrefix(id.Path(), "/"), "/")
	if len(segments) != 4 || segments[0] != "ns" || segments[2] != "sa" {
		return "", "", fmt.Errorf("%s does not have the form spiffe://%s/ns/<namespace>/sa/<service account>", id, td.Name())
	}
	return segments[1], segments[3], nil
}

// choose finds whose identity is asked for. It is the caller's own; or, if a node's proxy
// asks on behalf of a pod, that of a pod on the proxy's own node. The trust domain
// belongs to what is compared: one of another would be signed otherwise.
func (r *request) choose(ctx context.Context) error {
	if r.impersonated == "" {
		r.id = spiffeIDOf(r.s.cfg.TrustDomain, r.facts.GetNamespace(), r.facts.GetServiceAccount())
		r.actor = ""
		return nil
	}
	r.id = r.impersonated
	refused := func(format string, args ...any) error {
		return &refusal{
			code: codes.Unauthenticated, text: "request impersonation authentication failure",
			detail: fmt.Sprintf(format, args...), record: server.DirectPlacement,
		}
	}
	if r.caller == nil {
		return refused("whoever comes with a certificate may not ask for others")
	}
	if account := r.caller.Namespace + "/" + r.caller.ServiceAccount; !r.s.proxies[account] {
		return refused("%s is not trusted to ask for others", account)
	}
	if r.cluster.Pods == nil {
		return refused("the pods of cluster %s are not known here", r.cluster.Name)
	}
	namespace, account, err := parseIdentity(r.s.cfg.TrustDomain, r.impersonated)
	if err != nil {
		return refused("%v", err)
	}
	node := r.node.GetK8S().GetName()
	if node == "" {
		return refused("the caller's pod is not on a node yet")
	}
	pod, err := r.wait(ctx, func(ctx context.Context) (*Pod, error) { return r.cluster.Pods.OnNode(ctx, namespace, account, node) })
	switch {
	case errors.Is(err, ErrNoPod):
		return refused("no pod of %s/%s runs on the caller's node %s", namespace, account, node)
	case err != nil:
		return err
	case pod.Node != node || pod.Facts.GetNamespace() != namespace || pod.Facts.GetServiceAccount() != account:
		return refused("the pod of %s/%s runs on another node than the caller's", namespace, account)
	}
	r.facts = pod.Facts
	return nil
}
