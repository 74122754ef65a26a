package helm

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
	"github.com/google/go-cmp/cmp"
)

// networkPolicy is a NetworkPolicy as far as the chart uses it. What else there is in
// its text is an error, so that nothing is overlooked here.
type networkPolicy struct {
	Metadata struct {
		Namespace string `yaml:"namespace"`
	} `yaml:"metadata"`
	Spec struct {
		PodSelector podSelector   `yaml:"podSelector"`
		PolicyTypes []string      `yaml:"policyTypes"`
		Ingress     []ingressRule `yaml:"ingress"`
	} `yaml:"spec"`
}

type podSelector struct {
	MatchLabels map[string]string `yaml:"matchLabels"`
}

func (s *podSelector) selects(labels map[string]string) bool {
	for k, v := range s.MatchLabels {
		if labels[k] != v {
			return false
		}
	}
	return true
}

type ingressRule struct {
	From []struct {
		PodSelector       *podSelector `yaml:"podSelector"`
		NamespaceSelector *podSelector `yaml:"namespaceSelector"`
		IPBlock           *struct {
			CIDR netip.Prefix `yaml:"cidr"`
		} `yaml:"ipBlock"`
	} `yaml:"from"`
	Ports []struct {
		Port string `yaml:"port"` // its name
	} `yaml:"ports"`
}

// endpoint is a pod; or, without a namespace, an address outside of the cluster.
type endpoint struct {
	namespace string
	labels    map[string]string
	ports     map[string]int // of its containers, by name
	address   netip.Addr
}

// allowed says whether a connection is allowed, as the API's reference has it: a pod that
// no policy selects is open; of those that select it, one rule is enough; in a rule, one
// of its peers and one of its ports; a peer's selectors count together, and without one of
// namespaces it is of the policy's own.
func allowed(policies []networkPolicy, from, to endpoint, port int) bool {
	isolated := false
	for _, p := range policies {
		if p.Metadata.Namespace != to.namespace || !slices.Contains(p.Spec.PolicyTypes, "Ingress") || !p.Spec.PodSelector.selects(to.labels) {
			continue
		}
		isolated = true
		for _, rule := range p.Spec.Ingress {
			if rule.admits(from, p.Metadata.Namespace) && rule.opens(to, port) {
				return true
			}
		}
	}
	return !isolated
}

func (r *ingressRule) admits(from endpoint, namespace string) bool {
	if len(r.From) == 0 {
		return true
	}
	for _, p := range r.From {
		switch {
		case p.IPBlock != nil:
			if from.namespace == "" && p.IPBlock.CIDR.Contains(from.address) {
				return true
			}
		case from.namespace == "":
		case p.NamespaceSelector == nil && from.namespace != namespace,
			p.NamespaceSelector != nil && !p.NamespaceSelector.selects(map[string]string{"kubernetes.io/metadata.name": from.namespace}),
			p.PodSelector != nil && !p.PodSelector.selects(from.labels):
		default:
			return true
		}
	}
	return false
}

func (r *ingressRule) opens(to endpoint, port int) bool {
	if len(r.Ports) == 0 {
		return true
	}
	for _, p := range r.Ports {
		if number, ok := to.ports[p.Port]; ok && number == port {
			return true
		}
	}
	return false
}

// rendered are the policies that the chart makes of values, and the pods that it makes.
func rendered(t *testing.T, args ...string) (policies []networkPolicy, pods map[string]endpoint) {
	t.Helper()
	pods = make(map[string]endpoint)
	for text := range strings.SplitSeq(render(t, args...), "\n---\n") {
		var object struct {
			Kind     string `yaml:"kind"`
			Metadata struct {
				Namespace string `yaml:"namespace"`
			} `yaml:"metadata"`
			Spec struct {
				Template struct {
					Metadata struct {
						Labels map[string]string `yaml:"labels"`
					} `yaml:"metadata"`
					Spec struct {
						HostNetwork bool `yaml:"hostNetwork"`
						Containers  []struct {
							Ports []struct {
								Name          string `yaml:"name"`
								ContainerPort int    `yaml:"containerPort"`
							} `yaml:"ports"`
						} `yaml:"containers"`
					} `yaml:"spec"`
				} `yaml:"template"`
			} `yaml:"spec"`
		}
		if err := yaml.Unmarshal([]byte(text), &object); err != nil {
			t.Fatal(err)
		}
		switch object.Kind {
		case "NetworkPolicy":
			var p networkPolicy
			if err := yaml.UnmarshalWithOptions([]byte(onlySpec(text)), &p.Spec, yaml.Strict()); err != nil {
				t.Fatalf("the evaluation does not know all of it: %v\n%s", err, text)
			}
			p.Metadata.Namespace = object.Metadata.Namespace
			policies = append(policies, p)
		case "StatefulSet", "DaemonSet":
			template := object.Spec.Template
			if template.Spec.HostNetwork {
				t.Errorf("a pod of %s is in the host's network, where policies do not hold", object.Kind)
			}
			pod := endpoint{namespace: object.Metadata.Namespace, labels: template.Metadata.Labels, ports: make(map[string]int)}
			for _, p := range template.Spec.Containers[0].Ports {
				pod.ports[p.Name] = p.ContainerPort
			}
			pods[map[string]string{"StatefulSet": "CA", "DaemonSet": "agent"}[object.Kind]] = pod
		}
	}
	return policies, pods
}

// onlySpec is the spec of an object's text.
func onlySpec(text string) string {
	_, spec, _ := strings.Cut(text, "\nspec:\n")
	return spec
}

// The cluster of the tests does not enforce policies; so they are evaluated. Of everybody
// who could connect to everything, exactly those may who have to: agents to the CA,
// Prometheus to the metrics, Istio's clients to their listener, and whom the values name.
// The console is nobody's but by way of the API server (kubectl port-forward), which is
// not restricted by policies, and neither are the kubelet's probes. What the CA itself
// connects to, such as the API server, is not restricted.
func TestNetworkPoliciesAllowWhatIsNeeded(t *testing.T) {
	for _, c := range []struct {
		name string
		args []string
		want []string // who may connect to what
	}{
		{name: "default", want: []string{"agent -> CA:8443"}},
		{
			name: "Istio", args: []string{"--set=istio.enabled=true"},
			want: []string{
				"agent -> CA:8443", "CA -> CA:15012", "agent -> CA:15012", "agent of another release -> CA:15012", "impostor -> CA:15012", "neighbour -> CA:15012",
				"prometheus -> CA:15012", "sidecar -> CA:15012",
			},
		},
		{
			name: "Prometheus", args: []string{"--set-json=networkPolicy.metricsFrom=[{\"namespaceSelector\":{\"matchLabels\":{\"kubernetes.io/metadata.name\":\"monitoring\"}}}]"},
			want: []string{"agent -> CA:8443", "prometheus -> CA:9640", "prometheus -> agent:9641"},
		},
		{
			name: "agents outside", args: []string{"--set-json=networkPolicy.caFrom=[{\"ipBlock\":{\"cidr\":\"10.0.0.0/8\"}}]"},
			want: []string{"agent -> CA:8443", "machine -> CA:8443"},
		},
		{name: "no agents here", args: []string{"--set=agent.enabled=false"}, want: []string{"agent -> CA:8443"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			policies, pods := rendered(t, c.args...)
			_, all := rendered(t)
			agent := all["agent"]
			labelled := func(k, v string) map[string]string {
				labels := maps.Clone(agent.labels)
				labels[k] = v
				return labels
			}
			from := map[string]endpoint{
				"agent": agent, "CA": pods["CA"],
				"agent of another release": {namespace: "meshid", labels: labelled("app.kubernetes.io/instance", "other")},
				"neighbour":                {namespace: "meshid", labels: map[string]string{"app": "web"}},
				"impostor":                 {namespace: "shop", labels: agent.labels},
				"sidecar":                  {namespace: "shop", labels: map[string]string{"app": "web"}},
				"prometheus":               {namespace: "monitoring", labels: map[string]string{"app": "prometheus"}},
				"machine":                  {address: netip.MustParseAddr("10.1.2.3")},
				"stranger":                 {address: netip.MustParseAddr("192.0.2.1")},
			}
			var got []string
			for source, f := range from {
				for target, pod := range pods {
					for _, port := range []int{8443, 8444, 9640, 9641, 15012} { // 8444 is the console's
						if allowed(policies, f, pod, port) {
							got = append(got, fmt.Sprintf("%s -> %s:%d", source, target, port))
						}
					}
				}
			}
			slices.Sort(got)
			slices.Sort(c.want)
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Errorf("connections that are allowed: -want +got\n%s", diff)
			}
			for _, p := range policies {
				if slices.Contains(p.Spec.PolicyTypes, "Egress") {
					t.Errorf("what the CA or an agent connects to is restricted: %+v", p)
				}
			}
		})
	}
	t.Run("off", func(t *testing.T) {
		if policies, _ := rendered(t, "--set=networkPolicy.enabled=false"); len(policies) != 0 {
			t.Errorf("%d policies", len(policies))
		}
	})
}
