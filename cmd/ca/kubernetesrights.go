package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/meshid/meshid/internal/kube"
	"github.com/meshid/meshid/pkg/attest/node/k8spsat"
	"github.com/meshid/meshid/pkg/ca/upstream/certmanager"
	"github.com/meshid/meshid/pkg/ca/upstream/k8scsr"
	"github.com/meshid/meshid/pkg/istio"
	"github.com/meshid/meshid/pkg/kubernetes"
)

// certificatesGroup is the API group of signers, and of what is theirs; certManagerGroup
// that of cert-manager.
const (
	certificatesGroup = "certificates.k8s.io"
	certManagerGroup  = "cert-manager.io"
)

// need is a right that the CA needs in a cluster.
type need struct {
	Verb        string `json:"verb"`
	Group       string `json:"group,omitempty"`
	Resource    string `json:"resource"`
	Subresource string `json:"subresource,omitempty"`
	Name        string `json:"name,omitempty"`
	Namespace   string `json:"namespace,omitempty"`
	// OrName is another name that is as good as Name.
	OrName string `json:"-"`
}

func (n need) String() string {
	what := n.Resource
	if n.Group != "" {
		what += "." + n.Group
	}
	if n.Subresource != "" {
		what += "/" + n.Subresource
	}
	if n.Name != "" {
		what += " " + n.Name
	}
	if n.Namespace != "" {
		what += " in " + n.Namespace
	}
	return n.Verb + " " + what
}

// fix says which rule of a role gives the right.
func (n need) fix() string {
	resource := n.Resource
	if n.Subresource != "" {
		resource += "/" + n.Subresource
	}
	rule := fmt.Sprintf("{apiGroups: [%q], resources: [%s], verbs: [%s]", n.Group, resource, n.Verb)
	if n.Name != "" {
		rule += fmt.Sprintf(", resourceNames: [%s]", n.Name)
	}
	role := "the ClusterRole of the CA's service account"
	if n.Namespace != "" {
		role = "a Role in " + n.Namespace + " that is bound to the CA's service account"
	}
	return "add to " + role + ": " + rule + "}"
}

// rights are those that the settings need, and the TrustBundle objects that were read.
func (t *clusterTrial) rights() []need {
	var all []need
	add := func(n need, verbs ...string) {
		for _, n.Verb = range verbs {
			all = append(all, n)
		}
	}
	review := func() { add(need{Group: "authentication.k8s.io", Resource: "tokenreviews"}, "create") }
	configMap := func(name string) {
		add(need{Resource: "namespaces"}, "list", "watch")
		add(need{Resource: "configmaps", Name: name}, "list", "watch", "patch")
		add(need{Resource: "configmaps"}, "create")
	}
	signer := func(name, verb string) { all = append(all, signerRight(name, verb)) }
	clusterTrustBundle := func(name string) {
		add(need{Group: certificatesGroup, Resource: "clustertrustbundles"}, "list", "watch", "create")
		add(need{Group: certificatesGroup, Resource: "clustertrustbundles", Name: name}, "patch")
		if s := kubernetes.SignerOf(name); s != "" {
			signer(s, "attest")
		}
	}

	s := &t.settings
	if t.attestation != nil && t.attestation.TokenReview != nil && *t.attestation.TokenReview == (k8spsat.TokenReviewConfig{}) {
		review()
	}
	if s.Placement != "off" || s.PodCertificates.Signer != "" {
		add(need{Resource: "pods"}, "list", "watch")
		add(need{Resource: "nodes"}, "list", "watch")
	}
	if s.Entries {
		add(need{Group: kubernetes.Group, Resource: "registrationentries"}, "list", "watch")
		add(need{Group: kubernetes.Group, Resource: "registrationentries", Subresource: "status"}, "patch")
	}
	if s.TrustBundles {
		add(need{Group: kubernetes.Group, Resource: "trustbundles"}, "list", "watch")
		add(need{Group: kubernetes.Group, Resource: "trustbundles", Subresource: "status"}, "patch")
		add(need{Group: kubernetes.Group, Resource: "trustbundles", Subresource: "finalizers"}, "update") // to own what is published
	}
	for _, b := range t.bundles {
		if name := b.Spec.ConfigMap.Name; name != "" {
			configMap(name)
		}
		if name := b.Spec.ClusterTrustBundle.Name; name != "" {
			clusterTrustBundle(name)
		}
	}
	if name := s.Bundle.ConfigMap; name != "" {
		configMap(name)
	}
	if name := s.Bundle.ClusterTrustBundle; name != "" {
		clusterTrustBundle(name)
	}
	if name := s.PodCertificates.Signer; name != "" {
		add(need{Group: certificatesGroup, Resource: "podcertificaterequests"}, "get", "list", "watch")
		add(need{Group: certificatesGroup, Resource: "podcertificaterequests", Subresource: "status"}, "patch")
		signer(name, "sign")
	}
	if t.istio != nil {
		for _, c := range t.istio.Clusters {
			if c.Name != s.Name {
				continue
			}
			if c.JWKS == nil {
				review()
			}
			if c.Roots.Keep {
				configMap(cmp.Or(c.Roots.Name, istio.DefaultRootsName))
			}
			if c.Istiod.Keep {
				secret := need{Resource: "secrets", Namespace: cmp.Or(c.Istiod.Namespace, istio.DefaultNamespace)}
				add(secret, "create")
				secret.Name = cmp.Or(c.Istiod.Secret, istio.DefaultIstiodSecret)
				add(secret, "list", "watch", "patch")
			}
		}
	}
	return sorted(all)
}

// signerRight is a right to a signer, for which that to all of its domain is as good.
func signerRight(name, verb string) need {
	domain, _, _ := strings.Cut(name, "/")
	return need{Verb: verb, Group: certificatesGroup, Resource: "signers", Name: name, OrName: domain + "/*"}
}

// csrRights are those that an upstream CA of the kind k8scsr needs.
func csrRights(c *k8scsr.Config) (all []need) {
	for _, verb := range []string{"create", "list", "watch", "delete"} {
		all = append(all, need{Verb: verb, Group: certificatesGroup, Resource: "certificatesigningrequests"})
	}
	if c.Approve {
		all = append(all, need{Verb: "patch", Group: certificatesGroup, Resource: "certificatesigningrequests", Subresource: "approval"}, signerRight(c.Signer, "approve"))
	}
	// cert-manager wants whoever asks an Issuer by this API to have a right to it there.
	if name, ok := strings.CutPrefix(c.Signer, "issuers.cert-manager.io/"); ok {
		namespace, issuer, _ := strings.Cut(name, ".")
		all = append(all, need{Verb: "reference", Group: certManagerGroup, Resource: "signers", Name: issuer, OrName: "*", Namespace: namespace})
	}
	if m := c.Roots.ConfigMap; m.Name != "" {
		all = append(all, need{Verb: "get", Resource: "configmaps", Name: m.Name, Namespace: m.Namespace})
	}
	if name := c.Roots.TrustBundle; name != "" {
		all = append(all, need{Verb: "get", Group: certificatesGroup, Resource: "clustertrustbundles", Name: name})
	}
	return sorted(all)
}

// certManagerRights are those that an upstream CA of the kind certmanager needs.
func certManagerRights(c *certmanager.Config) (all []need) {
	for _, verb := range []string{"create", "list", "watch", "delete"} {
		all = append(all, need{Verb: verb, Group: certManagerGroup, Resource: "certificaterequests", Namespace: c.Namespace})
	}
	return sorted(all)
}

// sorted are the rights by what they are to, each once.
func sorted(all []need) []need {
	slices.SortStableFunc(all, func(a, b need) int {
		return cmp.Or(strings.Compare(a.Group+"/"+a.Resource, b.Group+"/"+b.Resource), strings.Compare(a.Subresource, b.Subresource), strings.Compare(a.Name, b.Name))
	})
	seen := make(map[need]bool)
	return slices.DeleteFunc(all, func(n need) bool {
		defer func() { seen[n] = true }()
		return seen[n]
	})
}

// may asks the API server whether whom it knows this client as has a right.
func may(ctx context.Context, c *kube.Client, n need) (string, error) {
	names := []string{n.Name}
	if n.OrName != "" {
		names = append(names, n.OrName)
	}
	for _, n.Name = range names {
		if allowed, err := allowed(ctx, c, n); err != nil || allowed {
			return "", err
		}
	}
	n.Name = names[0]
	return "", &mistake{"it may not", n.fix()}
}

func allowed(ctx context.Context, c *kube.Client, n need) (bool, error) {
	review := map[string]any{
		"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
		"spec": map[string]any{"resourceAttributes": n},
	}
	var answer struct {
		Status struct {
			Allowed bool `json:"allowed"`
		} `json:"status"`
	}
	path := kube.Path{Resource: kube.Resource{Group: "authorization.k8s.io", Version: "v1", Plural: "selfsubjectaccessreviews"}}
	err := c.Create(ctx, path, review, &answer)
	return answer.Status.Allowed, err
}
