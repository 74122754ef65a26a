package k8spsat

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/meshid/meshid/pkg/attest"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
)

// maxLife is the longest life of a token that is accepted: for so long it is
// remembered that it was used.
const maxLife = 24 * time.Hour

// Config of the CA's half.
type Config struct {
	// The clusters whose nodes may attest: a list.
	Clusters []ClusterConfig `yaml:"clusters"`
}

// ClusterConfig is one cluster, with one of token_review and jwks.
type ClusterConfig struct {
	// Name of the cluster: a-z, 0-9, '-' and '_'. It is in the ids of its nodes, and the
	// agents' configuration has it.
	Name string `yaml:"name"`
	// The service accounts of node agents, as namespace/name: a list. Whoever may run
	// pods as one of them can be the node that they run on.
	ServiceAccounts []string `yaml:"service_accounts"`
	// Whom the tokens are for: the audience of the agents' projected volume.
	Audience string `yaml:"audience" default:"meshid"`
	// Have the cluster verify each token. The CA needs the ClusterRole
	// system:auth-delegator there.
	TokenReview *TokenReviewConfig `yaml:"token_review"`
	// Verify tokens by the cluster's keys: the CA needs no right there, and does not see
	// that a token's pod was deleted before the token expired.
	JWKS *JWKSConfig `yaml:"jwks"`
}

// TokenReviewConfig says how to reach a cluster.
type TokenReviewConfig struct {
	// Path of a kubeconfig; without it, as kubernetes.clusters says of the cluster of that
	// name, or else the service account of the CA's own pod.
	Kubeconfig string `yaml:"kubeconfig"`
	// Context of the kubeconfig; by default its current one.
	Context string `yaml:"context"`
}

// JWKSConfig says where a cluster's keys are.
type JWKSConfig struct {
	// Issuer of the cluster's tokens, from `kubectl get --raw
	// /.well-known/openid-configuration`.
	Issuer string `yaml:"issuer"`
	// Path of the key set, from `kubectl get --raw /openid/v1/jwks`. It is read again
	// when it changes.
	File string `yaml:"file"`
	// Instead of file: where the key set is served, such as
	// https://10.0.0.1:6443/openid/v1/jwks. It is fetched again for keys that are not in
	// it.
	URL string `yaml:"url"`
	// PEM file of the CAs that issue the URL's certificate; by default, those of the
	// system.
	CA string `yaml:"ca"`
	// File of the token that is shown at the URL; by default none.
	TokenFile string `yaml:"token_file"`
}

// SettingError says which setting is wrong.
type SettingError struct{ Setting, Message string }

// Error implements error.
func (e *SettingError) Error() string { return e.Setting + ": " + e.Message }

// Token is what a service account token proves. A field is empty if the token does not
// say.
type Token struct {
	Namespace, ServiceAccount, ServiceAccountUID string
	PodName, PodUID, NodeName, NodeUID           string
	ID                                           string
	IssuedAt, ExpiresAt                          time.Time
}

// Tokens verifies tokens of one cluster. It is called concurrently.
type Tokens interface {
	// Verify returns what a token proves that is the cluster's and good for audience. An
	// error wraps attest.ErrRefused if it is not; any other means that it is not known.
	Verify(ctx context.Context, token, audience string) (*Token, error)
}

// Used remembers which tokens were used.
type Used interface {
	// UseToken uses up the token with this name, durably, until it expires: of any
	// number of concurrent calls, on all CAs, one returns true.
	UseToken(ctx context.Context, name [32]byte, expires, now time.Time) (first bool, err error)
}

// Pods knows the pods of a cluster from the cluster itself. It is called concurrently.
type Pods interface {
	// CheckPod returns an error if it is known that the pod with this UID was deleted, has
	// ended, or is not on that node. A pod that it has not heard of yet is no error.
	CheckPod(node, podUID string) error
}

// Cluster is a cluster whose nodes may attest.
type Cluster struct {
	Config ClusterConfig
	Tokens Tokens
	// Pods may be nil: then a token's pod is not looked at.
	Pods Pods
}

// Verifier is the CA's half. It is safe for concurrent use.
type Verifier struct {
	clusters map[string]Cluster
	used     Used
}

// Check says what is wrong with a configuration, if anything is: a *SettingError.
func (c *Config) Check() error {
	if len(c.Clusters) == 0 {
		return &SettingError{"clusters", "missing; write at least one cluster, with name, service_accounts, and token_review or jwks"}
	}
	seen := make(map[string]bool)
	for i := range c.Clusters {
		cluster := &c.Clusters[i]
		at := func(setting string) string {
			return strings.TrimSuffix(fmt.Sprintf("clusters[%d].%s", i, setting), ".")
		}
		switch err := CheckCluster(cluster.Name); {
		case err != nil:
			return &SettingError{at("name"), err.Error()}
		case seen[cluster.Name]:
			return &SettingError{at("name"), fmt.Sprintf("there is a cluster %q already", cluster.Name)}
		case len(cluster.ServiceAccounts) == 0:
			return &SettingError{at("service_accounts"), "missing; write those that node agents run as, such as [meshid/agent]"}
		case (cluster.TokenReview == nil) == (cluster.JWKS == nil):
			return &SettingError{at(""), "write one of token_review (which may be {}) and jwks"}
		}
		seen[cluster.Name] = true
		for j, account := range cluster.ServiceAccounts {
			if namespace, name, ok := strings.Cut(account, "/"); !ok || namespace == "" || name == "" || strings.ContainsAny(account, ":* ") || strings.Contains(name, "/") {
				return &SettingError{at(fmt.Sprintf("service_accounts[%d]", j)), fmt.Sprintf("%.100q is no service account; write namespace/name", account)}
			}
		}
		cluster.Audience = cmp.Or(cluster.Audience, DefaultAudience)
	}
	return nil
}

// NewVerifier returns the CA's half. Each cluster's configuration was checked.
func NewVerifier(clusters []Cluster, used Used) *Verifier {
	v := &Verifier{clusters: make(map[string]Cluster, len(clusters)), used: used}
	for _, c := range clusters {
		v.clusters[c.Config.Name] = c
	}
	return v
}

// Method returns "k8s_psat".
func (*Verifier) Method() string { return Method }

// Verify has the token verified by its cluster, and uses it up.
func (v *Verifier) Verify(ctx context.Context, claim attest.Claim, _ attest.Challenge) (*attributesv1.Node, error) {
	name, token, err := decode(claim.Evidence)
	if err != nil {
		return nil, refuse("%w", err)
	}
	cluster, ok := v.clusters[name]
	if !ok {
		return nil, refuse("this CA knows no cluster %q", name)
	}
	proved, err := cluster.Tokens.Verify(ctx, token, cluster.Config.Audience)
	if err != nil {
		return nil, fmt.Errorf("%s: cluster %s: %w", Method, name, err)
	}
	now := time.Now()
	if err := cluster.check(proved, now); err != nil {
		return nil, refuse("cluster %s: %w", name, err)
	}
	// Last, so that a token that could be good is not used up by what is refused.
	first, err := v.used.UseToken(ctx, sha256.Sum256([]byte(name+"\x00"+proved.ID)), proved.ExpiresAt, now)
	switch {
	case err != nil:
		return nil, fmt.Errorf("%s: %w", Method, err)
	case !first:
		return nil, refuse("cluster %s: the token was used before: the kubelet replaces it after four fifths of its life, which expirationSeconds: 600 of the projected volume keeps short", name)
	}
	return &attributesv1.Node{
		Method: Method,
		Id:     name + "." + proved.NodeUID,
		K8S: &attributesv1.K8SNode{
			Cluster: name, Name: proved.NodeName, Uid: proved.NodeUID,
			Namespace: proved.Namespace, ServiceAccount: proved.ServiceAccount,
			PodName: proved.PodName, PodUid: proved.PodUID,
		},
	}, nil
}

// check says why a token of the cluster does not prove a node, if it does not.
func (c *Cluster) check(t *Token, now time.Time) error {
	account := t.Namespace + "/" + t.ServiceAccount
	switch {
	case t.Namespace == "" || t.ServiceAccount == "":
		return errors.New("the token is of nobody")
	case !slices.Contains(c.Config.ServiceAccounts, account):
		return fmt.Errorf("node agents do not run as service account %s: see service_accounts", account)
	case t.PodName == "" || t.PodUID == "":
		return errors.New("the token is bound to no pod: use a projected volume of the agent's pod")
	case t.NodeName == "" || t.NodeUID == "":
		return errors.New("the token does not say on which node its pod is: Kubernetes 1.30 and newer write it, once the pod is on a node")
	case t.ID == "":
		return errors.New("the token has no id (jti) by which it could be used once: Kubernetes 1.30 and newer write it")
	case !now.Before(t.ExpiresAt):
		return errors.New("the token has expired")
	case t.ExpiresAt.After(now.Add(maxLife)):
		return fmt.Errorf("the token is good for longer than %v: set expirationSeconds of the projected volume, to 600", maxLife)
	case c.Pods == nil:
		return nil
	}
	return c.Pods.CheckPod(t.NodeName, t.PodUID)
}

// refuse returns a refusal.
func refuse(format string, args ...any) error {
	return fmt.Errorf("%s: %w: %w", Method, attest.ErrRefused, fmt.Errorf(format, args...))
}
