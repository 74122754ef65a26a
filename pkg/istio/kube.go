package istio

import (
	"context"
	"errors"
	"fmt"
	"time"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"

	"github.com/meshid/meshid/internal/kube"
)

// clusterPods are the Pods of a cluster that is followed.
type clusterPods struct {
	pods   *kube.Pods
	strict bool
}

// PodsOf returns the Pods of a cluster; the caller runs pods. While the cluster cannot be
// heard, pods that were seen before are those that it has, or if strict, it cannot be said
// which it has.
func PodsOf(pods *kube.Pods, strict bool) Pods { return clusterPods{pods, strict} }

// Pod implements Pods.
func (c clusterPods) Pod(ctx context.Context, uid string) (*Pod, error) {
	if uid == "" {
		return nil, fmt.Errorf("%w: the token is not of a pod", ErrNoPod)
	}
	pod, _ := c.pods.AwaitPod(ctx, "", uid, func(p *kube.Pod) bool { return p.UID == uid && p.Node() != "" })
	if pod != nil && (pod.UID != uid || pod.Node() == "") {
		pod = nil
	}
	return c.found(pod)
}

// OnNode implements Pods: the oldest one.
func (c clusterPods) OnNode(ctx context.Context, namespace, serviceAccount, node string) (*Pod, error) {
	return c.found(c.pods.AwaitAccount(ctx, node, namespace, serviceAccount))
}

func (c clusterPods) found(pod *kube.Pod) (*Pod, error) {
	now := time.Now()
	gone := pod == nil || pod.Over(now)
	if _, why := c.pods.Behind(now); why != nil && (gone || c.strict) {
		return nil, fmt.Errorf("the cluster cannot be heard: %w", why)
	}
	if gone {
		return nil, ErrNoPod
	}
	facts := &attributesv1.Kubernetes{
		Namespace: pod.Namespace(), ServiceAccount: pod.ServiceAccount(), PodName: pod.Name, PodUid: pod.UID, Labels: pod.Labels(),
	}
	facts.OwnerKind, facts.OwnerName, facts.OwnerUid = pod.Owner()
	return &Pod{Node: pod.Node(), NodeUID: c.pods.NodeUID(pod.Node()), Facts: facts}, nil
}

// verifiedTokens are the Tokens of a cluster.
type verifiedTokens struct{ verifier kube.TokenVerifier }

// TokensOf returns the Tokens of a cluster.
func TokensOf(v kube.TokenVerifier) Tokens { return verifiedTokens{v} }

// Verify implements Tokens: it is good for one of the audiences.
func (v verifiedTokens) Verify(ctx context.Context, token string, audiences []string) (*Token, error) {
	var refused error
	for _, audience := range audiences {
		id, err := v.verifier.Verify(ctx, token, audience)
		switch {
		case err == nil:
			return &Token{
				Namespace: id.Namespace, ServiceAccount: id.ServiceAccount, PodName: id.PodName, PodUID: id.PodUID,
				NodeName: id.NodeName, NodeUID: id.NodeUID, Expires: id.ExpiresAt,
			}, nil
		case !errors.Is(err, kube.ErrToken):
			return nil, err
		default:
			refused = errors.Join(refused, err)
		}
	}
	return nil, fmt.Errorf("%w: %w", ErrToken, refused)
}
