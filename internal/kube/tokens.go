package kube

import (
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

const (
	// maxToken bounds a service account token, in bytes; some thousand are usual, and
	// proxies take no header of more than eight.
	maxToken = 16 << 10
	// clockSkew is how far the clock of a cluster may be ahead of this one's.
	clockSkew = 30 * time.Second
)

// ErrToken says that a token is not good for what it was shown for: trying again with
// it is useless. Any other error of a TokenVerifier says that it is not known.
var ErrToken = errors.New("token refused")

// refuse returns an error that wraps ErrToken. What is said must not hold the token.
func refuse(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrToken, fmt.Errorf(format, args...))
}

// TokenVerifier verifies tokens of the service accounts of one cluster. It is called
// concurrently, with tokens of strangers.
type TokenVerifier interface {
	// Verify returns who a token was issued to, if it is one of this cluster's and good
	// for audience now. An error wraps ErrToken if it is not; it never has the token in
	// it.
	Verify(ctx context.Context, token, audience string) (*TokenIdentity, error)
}

// TokenIdentity is what a service account token proves. It must not be modified.
type TokenIdentity struct {
	Namespace, ServiceAccount, ServiceAccountUID string
	// The pod that the token is bound to, as tokens in projected volumes are, and the
	// node that the pod was on when the token was made (Kubernetes 1.30 and newer).
	// Empty where the token does not say.
	PodName, PodUID, NodeName, NodeUID string
	// ID is the token's own (the claim jti): no two tokens of a cluster have the same.
	// Empty before Kubernetes 1.30.
	ID string
	// IssuedAt and ExpiresAt are what the token says.
	IssuedAt, ExpiresAt time.Time
}

// Username is the name of the service account as a user of the cluster.
func (i *TokenIdentity) Username() string {
	return "system:serviceaccount:" + i.Namespace + ":" + i.ServiceAccount
}

// claims are the claims of a token that are looked at.
type claims struct {
	Issuer    string   `json:"iss"`
	Subject   string   `json:"sub"`
	Audience  audience `json:"aud"`
	ID        string   `json:"jti"`
	Expires   seconds  `json:"exp"`
	NotBefore seconds  `json:"nbf"`
	IssuedAt  seconds  `json:"iat"`
	Cluster   struct {
		Namespace      string `json:"namespace"`
		ServiceAccount named  `json:"serviceaccount"`
		Pod            named  `json:"pod"`
		Node           named  `json:"node"`
	} `json:"kubernetes.io"`
}

// named is how a token names an object.
type named struct {
	Name string `json:"name"`
	UID  string `json:"uid"`
}

// seconds since 1970. Fractions, which RFC 7519 allows, are cut off.
type seconds int64

// UnmarshalJSON implements json.Unmarshaler.
func (s *seconds) UnmarshalJSON(b []byte) error {
	var f float64
	if err := json.Unmarshal(b, &f); err != nil {
		return err
	}
	if f < 0 || f > 1<<40 {
		return errors.New("a time is out of range")
	}
	*s = seconds(f)
	return nil
}

func (s seconds) time() time.Time { return time.Unix(int64(s), 0) }

// audience is one text, or a list of them.
type audience []string

// UnmarshalJSON implements json.Unmarshaler.
func (a *audience) UnmarshalJSON(b []byte) error {
	var one string
	if json.Unmarshal(b, &one) == nil {
		*a = audience{one}
		return nil
	}
	return json.Unmarshal(b, (*[]string)(a))
}

// readClaims reads the claims of a token without verifying its signature, and refuses
// those that cannot be good for an audience at now, whoever signed them. It costs
// nobody but this process anything.
func readClaims(token, audience string, now time.Time) (*claims, error) {
	if len(token) > maxToken {
		return nil, refuse("has more than %d bytes", maxToken)
	}
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return nil, refuse("is not a signed JSON Web Token")
	}
	var payload []byte
	for i, part := range parts {
		// Strict: that a token can be written in one way only lets its text stand for it.
		raw, err := base64.RawURLEncoding.Strict().DecodeString(part)
		if err != nil || len(raw) == 0 || strings.ContainsAny(part, "\r\n") {
			return nil, refuse("is cut off or altered")
		}
		if i == 1 {
			payload = raw
		}
	}
	var c claims
	if err := json.Unmarshal(payload, &c); err != nil {
		return nil, refuse("its claims cannot be read")
	}
	k := c.Cluster
	switch {
	case audience == "":
		return nil, errors.New("no audience is asked for") // which every token would do for
	case !slices.Contains(c.Audience, audience):
		return nil, refuse("is for %.200q, want %q: write that as audience of the projected volume", []string(c.Audience), audience)
	case c.Expires == 0:
		return nil, refuse("never expires, as those in Secrets: use a projected volume")
	case !now.Before(c.Expires.time()):
		return nil, refuse("has expired at %v", c.Expires.time().UTC())
	case now.Add(clockSkew).Before(max(c.NotBefore, c.IssuedAt).time()):
		return nil, refuse("is good from %v on only: compare the clocks", max(c.NotBefore, c.IssuedAt).time().UTC())
	case k.Namespace == "" || k.ServiceAccount.Name == "" || k.ServiceAccount.UID == "":
		return nil, refuse("is not of a service account")
	case (k.Pod.Name == "") != (k.Pod.UID == "") || (k.Node.Name == "") != (k.Node.UID == ""):
		return nil, refuse("names a pod or node without its UID")
	}
	if want := c.identity().Username(); c.Subject != want {
		return nil, refuse("is of subject %.200q, but of service account %.200q", c.Subject, want)
	}
	return &c, nil
}

// identity is what the claims say, if they are believed.
func (c *claims) identity() *TokenIdentity {
	k := c.Cluster
	return &TokenIdentity{
		Namespace: k.Namespace, ServiceAccount: k.ServiceAccount.Name, ServiceAccountUID: k.ServiceAccount.UID,
		PodName: k.Pod.Name, PodUID: k.Pod.UID, NodeName: k.Node.Name, NodeUID: k.Node.UID,
		ID: c.ID, IssuedAt: c.IssuedAt.time(), ExpiresAt: c.Expires.time(),
	}
}

// Reviewer verifies tokens by asking the cluster (TokenReview). It needs the right to
// create tokenreviews, which the ClusterRole system:auth-delegator has.
type Reviewer struct{ client *Client }

// NewReviewer returns a TokenVerifier that asks the client's cluster.
func NewReviewer(c *Client) *Reviewer { return &Reviewer{client: c} }

// tokenReviews is where tokens are reviewed.
var tokenReviews = Path{Resource: Resource{Group: "authentication.k8s.io", Version: "v1", Plural: "tokenreviews"}}

// tokenReview is a TokenReview, to be sent and as it is answered.
type tokenReview struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Spec       struct {
		Token     string   `json:"token,omitempty"`
		Audiences []string `json:"audiences,omitempty"`
	} `json:"spec"`
	Status *reviewed `json:"status,omitempty"`
}

// reviewed is the answer.
type reviewed struct {
	Authenticated bool     `json:"authenticated"`
	Audiences     []string `json:"audiences"`
	Error         string   `json:"error"`
	User          struct {
		Username string              `json:"username"`
		UID      string              `json:"uid"`
		Extra    map[string][]string `json:"extra"`
	} `json:"user"`
}

// Verify implements TokenVerifier. What cannot be good is refused without a call.
//
// The answer and the token's claims must say the same. An API server may know other
// ways to authenticate (OpenID Connect, a webhook), and somebody may have a name there
// that reads like a service account's.
func (r *Reviewer) Verify(ctx context.Context, token, audience string) (*TokenIdentity, error) {
	c, err := readClaims(token, audience, time.Now())
	if err != nil {
		return nil, err
	}
	began := time.Now()
	id, err := r.ask(ctx, token, audience, c)
	r.client.metrics.reviewed(began, err)
	return id, err
}

// ask has a token reviewed whose claims were read.
func (r *Reviewer) ask(ctx context.Context, token, audience string, c *claims) (*TokenIdentity, error) {
	review := &tokenReview{APIVersion: "authentication.k8s.io/v1", Kind: "TokenReview"}
	review.Spec.Token, review.Spec.Audiences = token, []string{audience}
	var answer tokenReview
	if err := r.client.Create(ctx, tokenReviews, review, &answer); err != nil {
		if errors.Is(err, ErrDenied) {
			err = fmt.Errorf("%w; bind the ClusterRole system:auth-delegator to whom the CA is there", err)
		}
		return nil, err
	}
	return answer.Status.identity(c, audience)
}

// Try has something reviewed that is no token, which needs the same right and answers
// nothing about anybody.
func (r *Reviewer) Try(ctx context.Context) error {
	review := &tokenReview{APIVersion: "authentication.k8s.io/v1", Kind: "TokenReview"}
	review.Spec.Token = "none"
	var answer tokenReview
	if err := r.client.Create(ctx, tokenReviews, review, &answer); err != nil {
		return err
	}
	if answer.Status == nil || answer.Status.Authenticated {
		return errors.New("the cluster takes anything for a token")
	}
	return nil
}

// identity is what was authenticated.
func (r *reviewed) identity(c *claims, audience string) (*TokenIdentity, error) {
	if r == nil {
		return nil, errors.New("the answer to a TokenReview has no status")
	}
	if !r.Authenticated {
		return nil, refuse("the cluster does not accept it: %.200s", strings.TrimSpace(cmp.Or(withoutToken(r.Error), "it does not say why")))
	}
	id := c.identity()
	if !slices.Contains(r.Audiences, audience) {
		// An API server that does not know audiences authenticates for itself.
		return nil, refuse("the cluster accepts it for %.200q, want %q", r.Audiences, audience)
	}
	for _, said := range []struct{ what, review, claim string }{
		{"user", r.User.Username, id.Username()},
		{"service account's UID", r.User.UID, id.ServiceAccountUID},
		{"pod", r.extra("authentication.kubernetes.io/pod-name"), id.PodName},
		{"pod's UID", r.extra("authentication.kubernetes.io/pod-uid"), id.PodUID},
	} {
		if said.review != said.claim {
			return nil, refuse("its %s is %.200q by its claims, and %.200q by the cluster", said.what, said.claim, said.review)
		}
	}
	// Older clusters do not repeat these. They are signed like the rest.
	for _, said := range []struct{ what, review, claim string }{
		{"node", r.extra("authentication.kubernetes.io/node-name"), id.NodeName},
		{"node's UID", r.extra("authentication.kubernetes.io/node-uid"), id.NodeUID},
	} {
		if said.review != "" && said.review != said.claim {
			return nil, refuse("its %s is %.200q by its claims, and %.200q by the cluster", said.what, said.claim, said.review)
		}
	}
	return id, nil
}

// extra returns what the cluster says of a user beside his name; empty if it says
// nothing or more than one thing.
func (r *reviewed) extra(key string) string {
	if values := r.User.Extra[key]; len(values) == 1 {
		return values[0]
	}
	return ""
}

// withoutToken keeps an API server's error if it is sure not to repeat a token.
func withoutToken(text string) string {
	for word := range strings.FieldsSeq(text) {
		if strings.Count(word, ".") >= 2 && len(word) > 100 {
			return "its reason is not repeated here, as it may hold the token"
		}
	}
	return text
}
