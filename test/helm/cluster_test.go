package helm

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshid/meshid/test/identitytest"
	"github.com/meshid/meshid/test/kube"
	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

// Installed by `helm install`, meshid gives every pod its own identity, stays when nodes
// are cut off or lost and values change, serves an unmodified Istio, and leaves nothing
// but what is meant to stay; then the same from the plain manifests. All commands are those
// of the documents, and there is none that is not run here.
func TestClusterInstall(t *testing.T) {
	require.Tool(t, "helm")
	require.Tool(t, "pilot-agent")
	i := installation{kube.StartCluster(t, kube.Options{
		Nodes: 2, KubeProxy: true,
		APIServerArgs: []string{"--kubelet-certificate-authority="}, // as kubeadm has it: kubelets make their certificates themselves
	}), t, newHandbook(t)}
	defer func() { // and not a Cleanup, before which calls end
		if t.Failed() {
			i.explain()
		}
	}()
	i.importImages()
	i.provision("1")
	i.documented("kubectl create namespace meshid")
	i.documented("kubectl label namespace")
	i.documented("helm install", "--timeout=4m")
	i.AwaitPods(t, "meshid", "app.kubernetes.io/name=meshid-agent", 2)

	within := func(name string, f func(i installation)) {
		began := time.Now()
		t.Run(name, func(t *testing.T) { f(installation{i.Cluster, t, i.docs}) })
		t.Logf("%s: %s", name, time.Since(began).Round(time.Second))
		if t.Failed() {
			t.FailNow() // what follows needs it
		}
	}
	within("agents attest", func(i installation) {
		uids := strings.Fields(i.MustKubectl(i.t, "get", "nodes", "-o", "jsonpath={.items[*].metadata.uid}"))
		local.Await(i.t, "all nodes attest", func(context.Context) error {
			nodes := i.documented("ca node list")
			for _, uid := range uids {
				if !strings.Contains(nodes, "/k8s_psat/kubernetes."+uid) {
					return fmt.Errorf("node %s is not there:\n%s", uid, nodes)
				}
			}
			return nil
		})
	})
	within("nothing is found wrong", func(i installation) {
		i.t.Log(i.documented("ca k8s check"))
		i.t.Log(i.documented("node-agent check"))
		if keys := i.documented("/openid/v1/jwks"); keys != "" { // they are in a file
			i.t.Errorf("it prints %s", keys)
		}
		if out := i.documented("/.well-known/openid-configuration"); !strings.Contains(out, i.Issuer) {
			i.t.Errorf("there is no issuer in %s", out)
		}
	})
	var pods []kube.RunningPod
	within("restricted pods have their identities", func(i installation) {
		i.Apply(i.t, entry)
		i.Apply(i.t, shop)
		pods = i.AwaitPods(i.t, "shop", "app=web", 4)
		reports := i.reports(pods)
		i.named(pods, reports)
		for at, r := range reports {
			i.t.Logf("first X.509-SVID of a pod on %s: %v", pods[at].Spec.NodeName, r.Waited)
		}
		i.requests(pods, reports, 20)
		local.Await(i.t, "the entry is in force", func(context.Context) error {
			if out := i.documented("kubectl get registrationentries #"); !strings.Contains(out, "True") || !strings.Contains(out, "2/2") {
				return errors.New(out)
			}
			return nil
		})
		if out := i.documented("kubectl describe registrationentry shop"); !strings.Contains(out, "Accepted") {
			i.t.Errorf("nothing says what became of it: %s", out)
		}
		if out := i.documented("ca entry explain --pod"); !strings.Contains(out, "match entry/k8s/kubernetes/shop -> spiffe://example.org/ns/shop/sa/web/pod/") {
			i.t.Errorf("nothing says which entry it is: %s", out)
		}
		i.Apply(i.t, "{apiVersion: meshid.io/v1alpha1, kind: RegistrationEntry, metadata: {name: misspelt}, spec: {spiffeID: 'spiffe://example.org/a', workloads: k8s.namespaces == \"shop\"}}")
		local.Await(i.t, "the mistake is named", func(context.Context) error {
			if out := i.documented("kubectl get registrationentries -o wide"); !strings.Contains(out, "False") || !strings.Contains(out, "namespaces") {
				return errors.New(out)
			}
			return nil
		})
		i.t.Log(i.MustKubectl(i.t, "get", "registrationentries", "-o", "wide"))
		i.MustKubectl(i.t, "delete", "registrationentry", "misspelt")
	})
	within("pods come and go", func(i installation) {
		var waited []time.Duration
		for range 2 {
			for _, count := range []int{0, 20, 40} { // in steps: each is waited for as long as a loaded machine may need
				i.MustKubectl(i.t, "scale", "-n", "shop", "deployment/web", fmt.Sprint("--replicas=", count))
				pods = i.AwaitPods(i.t, "shop", "app=web", count)
			}
			reports := i.reports(pods)
			i.named(pods, reports)
			for _, r := range reports {
				waited = append(waited, r.Waited)
			}
		}
		slices.Sort(waited)
		i.t.Logf("first X.509-SVID of %d pods, from the connection: p50 %v, p99 %v", len(waited), waited[len(waited)/2], waited[len(waited)*99/100])
		i.MustKubectl(i.t, "scale", "-n", "shop", "deployment/web", "--replicas=4")
		pods = i.AwaitPods(i.t, "shop", "app=web", 4)
	})
	within("a node is lost, banned, and comes back", func(i installation) {
		n := i.Nodes[1]
		n.Disconnect(i.t)
		n.AwaitReady(i.t, false)
		i.documented("ca node ban")
		banned := time.Now()
		i.documented("kubectl delete pods --all-namespaces")
		pods = i.AwaitPods(i.t, "shop", "app=web", 4)
		i.named(pods, i.reports(pods))
		for _, p := range pods {
			if p.Spec.NodeName == n.Name {
				i.t.Errorf("pod %s is on the node that is lost", p.Metadata.Name)
			}
		}
		// It comes back, with an agent that has a token of a pod that is there; and new pods
		// are put onto it.
		n.Connect(i.t)
		n.AwaitReady(i.t, true)
		local.Await(i.t, "pods may be put onto it", func(context.Context) error {
			taints, err := i.Kubectl(i.t, "get", "node", n.Name, "-o", "jsonpath={.spec.taints}")
			if err == nil && taints != "" {
				err = errors.New(taints)
			}
			return err
		})
		i.MustKubectl(i.t, "cordon", i.Nodes[0].Name)
		i.MustKubectl(i.t, "scale", "-n", "shop", "deployment/web", "--replicas=8")
		id := "kubernetes." + i.MustKubectl(i.t, "get", "node", n.Name, "-o", "jsonpath={.metadata.uid}")
		find := func(args ...string) string {
			return i.MustKubectl(i.t, append([]string{"-n", "meshid", "exec", "meshid-ca-0", "--", "ca", "ledger", "find", "--node", id, "--since", banned.UTC().Format(time.RFC3339Nano), "-o", "jsonl"}, args...)...)
		}
		local.Await(i.t, "its new pods run, and its agent is refused", func(ctx context.Context) error {
			var list struct {
				Items []kube.RunningPod `json:"items"`
			}
			if err := i.Do(ctx, http.MethodGet, "/api/v1/namespaces/shop/pods?fieldSelector=spec.nodeName="+n.Name, nil, &list); err != nil {
				return err
			}
			running := 0
			for _, p := range list.Items {
				if p.Metadata.DeletionTimestamp == "" && p.Status.Phase == "Running" {
					running++
				}
			}
			if running == 0 {
				return fmt.Errorf("none of %d pods runs there", len(list.Items))
			}
			if refused := find("--event", "attest", "--outcome", "refused"); !strings.Contains(refused, "banned") {
				return fmt.Errorf("no refusal: %s", refused)
			}
			return nil
		})
		for _, event := range []string{"issue", "attest", "renew_agent"} {
			if given := find("--event", event, "--outcome", "success"); given != "" {
				i.t.Errorf("a node that is banned was given: %s", given)
			}
		}
		i.MustKubectl(i.t, "uncordon", i.Nodes[0].Name)
		i.documented("ca node unban")
		i.documented("kubectl -n meshid delete pods")
		pods = i.AwaitPods(i.t, "shop", "app=web", 8)
		i.named(pods, i.reports(pods))
		i.AwaitPods(i.t, "meshid", "app.kubernetes.io/name=meshid-agent", 2)
		i.MustKubectl(i.t, "scale", "-n", "shop", "deployment/web", "--replicas=4")
		pods = i.AwaitPods(i.t, "shop", "app=web", 4)
	})
	within("an upgrade changes values", func(i installation) {
		before := i.reports(pods)
		agents := i.AwaitPods(i.t, "meshid", "app.kubernetes.io/name=meshid-agent", 2)
		// A mistake is found before anything is replaced.
		ca := i.AwaitPods(i.t, "meshid", "app.kubernetes.io/name=meshid-ca", 1)[0]
		i.shell("! "+i.command("--set ca.config.console"), "--timeout=4m", "--set=ca.config.svid.defaul_ttl=20m")
		if out := i.documented("logs job/meshid-ca-check"); !strings.Contains(out, `did you mean "default_ttl"`) {
			i.t.Errorf("the mistake is not named: %s", out)
		}
		if now := i.AwaitPods(i.t, "meshid", "app.kubernetes.io/name=meshid-ca", 1)[0]; now.Metadata.UID != ca.Metadata.UID {
			i.t.Error("the CA was replaced")
		}
		i.documented("--set ca.config.console", "--timeout=4m", "--set=ca.config.svid.default_ttl=20m")
		i.requests(pods, before, 20)
		for at, p := range i.AwaitPods(i.t, "meshid", "app.kubernetes.io/name=meshid-agent", 2) {
			if p.Metadata.UID != agents[at].Metadata.UID {
				i.t.Errorf("the agent on %s was started again for what only the CA has", p.Spec.NodeName)
			}
		}
		i.MustKubectl(i.t, "rollout", "restart", "-n", "shop", "deployment/web")
		i.MustKubectl(i.t, "rollout", "status", "-n", "shop", "deployment/web", "--timeout=110s")
		pods = i.AwaitPods(i.t, "shop", "app=web", 4)
		reports := i.reports(pods)
		i.named(pods, reports)
		for _, r := range reports {
			if r.Life > 30*time.Minute { // it begins some time before it is issued
				i.t.Errorf("an X.509-SVID lives %v: the value is not in force", r.Life)
			}
		}
		i.console()
	})
	within("the CA's volume is restored", func(i installation) {
		roots := func() string {
			return i.MustKubectl(i.t, "-n", "meshid", "exec", "meshid-ca-0", "--", "ca", "bundle", "show")
		}
		before := roots()
		i.snapshot("1", "restored")
		// What comes later is lost, but for what is declared in the cluster.
		i.shell("cat >entries.yaml <<'END'\n- {name: later, spiffe_id: 'spiffe://example.org/later', workloads: 'k8s.namespace == \"later\"'}\nEND\n" + i.command("ca entry apply"))
		i.Apply(i.t, strings.ReplaceAll(entry, `"shop"`, `"later"`)) // another rule of the same object
		i.Apply(i.t, strings.ReplaceAll(entry, "{name: shop}", "{name: shop-2}"))
		i.inForce("shop", "shop-2")
		i.MustKubectl(i.t, "scale", "-n", "shop", "deployment/web", "--replicas=6")
		pods = i.AwaitPods(i.t, "shop", "app=web", 6)
		reports := i.reports(pods)
		i.named(pods, reports)

		for _, part := range []string{"kubectl -n meshid delete statefulset", "kubectl -n meshid wait", "kubectl -n meshid delete pvc"} {
			i.documented(part)
		}
		i.documented("--set ca.restored", "--timeout=4m")
		i.AwaitPods(i.t, "meshid", "app.kubernetes.io/name=meshid-ca", 1)
		i.t.Log(i.documented("ca ledger verify"))
		if after := roots(); after != before {
			i.t.Errorf("its roots are others: %s, before %s", after, before)
		}
		local.Await(i.t, "what is declared in the cluster is in force again", func(context.Context) error {
			entries, err := i.Kubectl(i.t, "-n", "meshid", "exec", "meshid-ca-0", "--", "ca", "entry", "get")
			if err == nil && (strings.Contains(entries, "spiffe://example.org/later") || !strings.Contains(entries, "k8s/kubernetes/shop-2")) {
				err = errors.New(entries)
			}
			return err
		})
		i.Apply(i.t, entry)
		i.inForce("shop", "shop-2")
		i.MustKubectl(i.t, "delete", "registrationentry", "shop-2")
		i.requests(pods, reports, 20)
		i.MustKubectl(i.t, "rollout", "restart", "-n", "shop", "deployment/web")
		i.MustKubectl(i.t, "rollout", "status", "-n", "shop", "deployment/web", "--timeout=110s")
		pods = i.AwaitPods(i.t, "shop", "app=web", 6)
		i.named(pods, i.reports(pods))
		i.t.Log(i.documented("ca k8s check"))
	})
	within("an unmodified Istio takes its certificates from the CA", func(i installation) {
		i.documented("kubectl create namespace istio-system")
		// As if the mesh came from another CA, whose roots are given out, too.
		old := identitytest.NewAuthority(i.t, "example.org").Cert
		text := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: old.Raw}))
		i.shell("cat >old-root.pem <<'END'\n"+text+"END\n"+i.command("istio.previousRoots=old-root.pem"), "--timeout=4m")
		i.documented("--set istio.enabled=true,istio.keepRoots=true", "--timeout=4m", "--set=trustBundles=true")
		local.Await(i.t, "the old root is given out", func(context.Context) error {
			out, err := i.Kubectl(i.t, "get", "configmap", "-n", "istio-system", "istio-ca-root-cert", "-o", `jsonpath={.data.root-cert\.pem}`)
			if err == nil && !slices.ContainsFunc(certificates(i.t, out), old.Equal) {
				err = errors.New(out)
			}
			return err
		})
		i.documented("istio.previousRoots= ", "--timeout=4m") // the last step of a mesh that moves
		i.Apply(i.t, require.Example(i.t, "istio.md", "yaml file=registrationentries.yaml"))
		i.Apply(i.t, trustBundle)
		i.Apply(i.t, sidecars)
		roots := func(namespace string) string {
			return i.MustKubectl(i.t, "get", "configmap", "-n", namespace, "istio-ca-root-cert", "-o", `jsonpath={.data.root-cert\.pem}`)
		}
		for _, p := range i.AwaitPods(i.t, "bookinfo", "app=ratings", 2) {
			chain := i.MustKubectl(i.t, "exec", "-n", "bookinfo", p.Metadata.Name, "--", "/busybox", "cat", "/etc/istio-output-certs/cert-chain.pem")
			i.verified(chain, roots("bookinfo"), "spiffe://example.org/ns/bookinfo/sa/default")
		}
		local.Await(i.t, "the control plane has its certificate", func(context.Context) error {
			_, err := i.Kubectl(i.t, "get", "secret", "-n", "istio-system", "istiod-tls")
			return err
		})
		encoded := i.MustKubectl(i.t, "get", "secret", "-n", "istio-system", "istiod-tls", "-o", `go-template={{index .data "tls.crt" | base64decode}}`)
		i.verified(encoded, roots("istio-system"), "spiffe://example.org/ns/istio-system/sa/istiod-service-account")
		i.t.Log(i.documented("ca k8s check")) // and has all the rights that this needs
		i.MustKubectl(i.t, "delete", "namespace", "bookinfo", "--timeout=110s")
	})
	within("kubelets with certificates of their own, no CSI, nodes/proxy", func(i installation) {
		i.MustKubectl(i.t, "delete", "namespace", "shop", "--timeout=110s")
		i.kubelets(true)
		i.documented("--set ca.config.console", "--timeout=4m", "--set=agent.csi=false,agent.nodesProxy=true")
		i.AwaitPods(i.t, "meshid", "app.kubernetes.io/name=meshid-agent", 2)
		if out := i.MustKubectl(i.t, "get", "pods", "-n", "meshid", "-o", "jsonpath={.items[*].spec.containers[*].securityContext}"); strings.Contains(out, "privileged") {
			i.t.Errorf("a container is: %s", out)
		}
		if out := i.MustKubectl(i.t, "get", "csidrivers", "-o", "name"); strings.Contains(out, "meshid") {
			i.t.Errorf("there is still %s", out)
		}
		for _, n := range i.Nodes {
			if out, err := n.Exec(i.t, "ls", "/var/lib/kubelet/plugins_registry"); out != "" || err != nil {
				i.t.Errorf("the kubelet of %s still has %s (%v)", n.Name, out, err)
			}
		}
		if out := i.MustKubectl(i.t, "get", "clusterrole", "meshid-agent", "-o", "jsonpath={.rules[*].resources}"); out != `["nodes/proxy"]` {
			i.t.Errorf("agents may get %s", out)
		}
		i.Apply(i.t, hostPath.Replace(shop))
		pods = i.AwaitPods(i.t, "shop", "app=web", 4)
		i.named(pods, i.reports(pods))
	})
	within("what is uninstalled is gone", func(i installation) {
		i.MustKubectl(i.t, "delete", "namespace", "shop", "--timeout=110s")
		i.documented("helm uninstall", "--timeout=4m")
		stays := []string{
			"ConfigMap/meshid/meshid-bundle", "ConfigMap/meshid/kube-root-ca.crt", "Namespace//meshid", "ServiceAccount/meshid/default", // those are the namespace
			"CustomResourceDefinition//registrationentries.meshid.io", "CustomResourceDefinition//trustbundles.meshid.io",
			"APIService//v1alpha1.meshid.io", "ClusterTrustBundle//meshid.io:svid:bundle",
			"PersistentVolumeClaim/meshid/data-meshid-ca-0", "Secret/istio-system/istiod-tls",
		}
		everywhere := regexp.MustCompile("^ConfigMap/[^/]+/(istio-ca-root-cert|meshid-roots)$")
		local.Await(i.t, "all is gone that does not stay", func(context.Context) error {
			left := slices.DeleteFunc(i.objects(), func(o string) bool { return slices.Contains(stays, o) || everywhere.MatchString(o) })
			if len(left) > 0 {
				return errors.New(strings.Join(left, " "))
			}
			return nil
		})
		for _, part := range []string{
			"kubectl delete -f deploy/kubernetes/crds.yaml", "metadata.name=meshid-bundle", "kubectl delete namespace meshid", "metadata.name=istio-ca-root-cert", "delete secret istiod-tls",
		} {
			i.documented(part)
		}
		local.Await(i.t, "all is gone", func(context.Context) error {
			if left := i.objects(); len(left) > 0 {
				return errors.New(strings.Join(left, " "))
			}
			return nil
		})
		for _, n := range i.Nodes {
			if left, want := i.files(n), "run/meshid var/lib/kubelet/plugins/csi.meshid.io var/lib/meshid"; left != want {
				i.t.Errorf("left on %s: %s, want %s", n.Name, left, want)
			}
			if _, err := n.Exec(i.t, "sh", "-c", i.command("rm -rf")); err != nil {
				i.t.Error(err)
			}
			if left := i.files(n); left != "" {
				i.t.Errorf("left on %s: %s", n.Name, left)
			}
		}
	})
	within("the plain manifests do the same", func(i installation) {
		i.kubelets(false)
		i.provision("2")
		manifests := manifest(i.t, "meshid.yaml")
		for _, m := range regexp.MustCompile(`(?m)^ +image: (meshid/\S+)$`).FindAllStringSubmatch(manifests, -1) {
			for _, n := range i.Nodes {
				if _, err := n.Exec(i.t, "ctr", "--namespace=k8s.io", "images", "tag", "docker.io/"+m[1], "registry.example.com/"+m[1]); err != nil {
					i.t.Fatal(err)
				}
			}
		}
		i.documented("kubectl apply --server-side -f deploy/kubernetes/crds.yaml")
		i.documented("sed -e")
		i.AwaitPods(i.t, "meshid", "app.kubernetes.io/name=meshid-agent", 2)
		i.Apply(i.t, strings.ReplaceAll(entry, "example.org", "prod.example.com"))
		i.Apply(i.t, shop)
		pods := i.AwaitPods(i.t, "shop", "app=web", 4)
		i.namedIn("prod.example.com", pods, i.reports(pods))
		i.documented("helm template") // how to make others

		i.MustKubectl(i.t, "delete", "namespace", "shop", "--timeout=110s")
		i.documented("kubectl delete -f deploy/kubernetes/meshid.yaml")
		stays := regexp.MustCompile(`^(CustomResourceDefinition//.*|APIService//v1alpha1)\.meshid\.io$`)
		local.Await(i.t, "all is gone that does not stay", func(context.Context) error {
			left := slices.DeleteFunc(i.objects(), stays.MatchString)
			if len(left) > 0 {
				return errors.New(strings.Join(left, " "))
			}
			return nil
		})
	})
	for _, line := range i.docs.all {
		if !i.docs.run[line] && !strings.HasPrefix(line, "make images") { // importImages does what it does, with programs that are built already
			t.Errorf("no test runs this command of the documents: %s", line)
		}
	}
}

// kubelets starts the kubelets again, with certificates that they make themselves or
// those of the cluster's CA, and waits until they serve with them.
func (i installation) kubelets(selfSigned bool) {
	i.t.Helper()
	trusted, err := os.ReadFile(i.CAFile)
	if err != nil {
		i.t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(trusted)
	for _, n := range i.Nodes {
		n.KubeletCertificate(i.t, selfSigned)
	}
	for _, n := range i.Nodes {
		local.Await(i.t, "the kubelet of "+n.Name+" serves", func(ctx context.Context) error {
			d := tls.Dialer{Config: &tls.Config{RootCAs: roots, ServerName: n.Name}}
			conn, err := d.DialContext(ctx, "tcp", n.IP+":10250")
			if err == nil {
				err = conn.Close()
			}
			if unknown := (x509.UnknownAuthorityError{}); selfSigned && errors.As(err, &unknown) {
				return nil
			}
			if selfSigned && err == nil {
				err = errors.New("its certificate is the cluster's")
			}
			return err
		})
	}
}
