package helm

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshid/meshid/test/kube"
	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
	"github.com/meshid/meshid/test/shop/image"
)

const (
	podImage        = "meshid.test/pod:1"
	pilotAgentImage = "meshid.test/pilot-agent:1"
	webIP           = "10.96.7.9"
)

// shop is a namespace in which only restricted pods may run, and a service of them.
const shop = `
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {pod-security.kubernetes.io/enforce: restricted}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: web, namespace: shop}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIP: ` + webIP + `, selector: {app: web}, ports: [{port: 8443}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec:
  replicas: 4
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      serviceAccountName: web
      automountServiceAccountToken: false
      terminationGracePeriodSeconds: 1
      topologySpreadConstraints:
        - {maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: ScheduleAnyway, labelSelector: {matchLabels: {app: web}}}
      securityContext: {runAsNonRoot: true, runAsUser: 1000, seccompProfile: {type: RuntimeDefault}}
      containers:
        - name: app
          image: ` + podImage + `
          args: [/run/meshid/agent.sock, '` + webIP + `:8443']
          readinessProbe: {httpGet: {port: 8080, path: /}, periodSeconds: 1, timeoutSeconds: 10}
          securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
          volumeMounts: [{name: meshid, mountPath: /run/meshid, readOnly: true}]
      volumes:
        - name: meshid
          csi: {driver: csi.meshid.io, readOnly: true}
`

// hostPath makes of shop's pods such that have the socket without the driver.
var hostPath = strings.NewReplacer("csi: {driver: csi.meshid.io, readOnly: true}", "hostPath: {path: /run/meshid/workload, type: Directory}", "enforce: restricted", "enforce: privileged")

// entry gives each pod of the shop a name of its own, so that a wrong one is seen.
const entry = `
apiVersion: meshid.io/v1alpha1
kind: RegistrationEntry
metadata: {name: shop}
spec:
  spiffeID: spiffe://example.org/ns/{k8s.namespace}/sa/{k8s.service_account}/pod/{k8s.pod_uid}
  workloads: k8s.namespace == "shop" && k8s.service_account == "web"
`

// volume is what a provisioner would make for the CA's claim; %[1]s is another one each time.
const volume = `
apiVersion: v1
kind: PersistentVolume
metadata: {name: ca-%[1]s}
spec:
  capacity: {storage: 8Gi}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  local: {path: /var/lib/volume-%[1]s}
  nodeAffinity:
    required: {nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [node-1]}]}]}
`

// sidecars are pods with Istio's agent in them, as Istio's injection makes them, but for
// Envoy: it writes what it has got to files.
const sidecars = `
apiVersion: v1
kind: Namespace
metadata: {name: bookinfo}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: ratings, namespace: bookinfo}
spec:
  selector: {matchLabels: {app: ratings}}
  template:
    metadata: {labels: {app: ratings}}
    spec:
      terminationGracePeriodSeconds: 1
      securityContext: {runAsUser: 1337, runAsGroup: 1337, fsGroup: 1337}
      containers:
        - name: istio-proxy
          image: ` + pilotAgentImage + `
          args: [proxy, sidecar, --domain, $(POD_NAMESPACE).svc.cluster.local]
          env:
            - {name: CA_ADDR, value: 'meshid-ca.meshid.svc:15012'}
            - {name: PROXY_CONFIG, value: '{"discoveryAddress":"istiod.istio-system.svc:15012"}'}
            - {name: TRUST_DOMAIN, value: example.org}
            - {name: ISTIO_META_CLUSTER_ID, value: Kubernetes}
            - {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
            - {name: POD_NAMESPACE, valueFrom: {fieldRef: {fieldPath: metadata.namespace}}}
            - {name: INSTANCE_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
            - {name: SERVICE_ACCOUNT, valueFrom: {fieldRef: {fieldPath: spec.serviceAccountName}}}
            - {name: DISABLE_ENVOY, value: "true"}
            - {name: OUTPUT_CERTS, value: /etc/istio-output-certs}
          readinessProbe: {exec: {command: [/busybox, test, -s, /etc/istio-output-certs/cert-chain.pem]}, periodSeconds: 1, timeoutSeconds: 10}
          volumeMounts:
            - {name: istio-token, mountPath: /var/run/secrets/tokens}
            - {name: istiod-ca-cert, mountPath: /var/run/secrets/istio}
            - {name: workload-socket, mountPath: /var/run/secrets/workload-spiffe-uds}
            - {name: credential-socket, mountPath: /var/run/secrets/credential-uds}
            - {name: istio-envoy, mountPath: /etc/istio}
            - {name: certs, mountPath: /etc/istio-output-certs}
      volumes:
        - {name: workload-socket, emptyDir: {}}
        - {name: credential-socket, emptyDir: {}}
        - {name: istio-envoy, emptyDir: {}}
        - {name: certs, emptyDir: {}}
        - {name: istiod-ca-cert, configMap: {name: istio-ca-root-cert}}
        - name: istio-token
          projected: {sources: [{serviceAccountToken: {path: istio-token, expirationSeconds: 43200, audience: istio-ca}}]}
`

// trustBundle publishes the roots everywhere, and goes with all that it publishes.
const trustBundle = `
apiVersion: meshid.io/v1alpha1
kind: TrustBundle
metadata: {name: mesh}
spec:
  configMap: {name: meshid-roots}
  clusterTrustBundle: {name: "meshid.io:svid:bundle"}
`

// installation is meshid in a cluster.
type installation struct {
	*kube.Cluster
	t    *testing.T
	docs *handbook
}

// handbook are the commands of the documents.
type handbook struct {
	all []string
	run map[string]bool
}

// command is a block of commands in a document, with what stands after its language.
var command = regexp.MustCompile("(?ms)^```sh *(\\w*)\\n(.*?)^```$")

// commands are those of a page, in blocks of these options.
func commands(t *testing.T, page string, options ...string) (lines []string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(require.Repository(), "docs", page))
	if err != nil {
		t.Fatal(err)
	}
	for _, block := range command.FindAllStringSubmatch(string(text), -1) {
		if slices.Contains(options, block[1]) {
			lines = append(lines, strings.Split(strings.TrimSpace(block[2]), "\n")...)
		}
	}
	return lines
}

// newHandbook reads the commands that have to be run in a whole cluster: all of
// docs/kubernetes.md, and those of docs/istio.md that need the chart.
func newHandbook(t *testing.T) *handbook {
	t.Helper()
	return &handbook{all: append(commands(t, "kubernetes.md", "", "node"), commands(t, "istio.md", "chart", "off")...), run: make(map[string]bool)}
}

// documented runs the command of the documents that has this part, with more arguments,
// and returns what it prints.
func (i installation) documented(part string, more ...string) string {
	i.t.Helper()
	return i.shell(i.command(part), more...)
}

// command is the one of the documents that has this part, without its comment.
func (i installation) command(part string) string {
	i.t.Helper()
	var found []string
	for _, line := range i.docs.all {
		if strings.Contains(line, part) {
			found = append(found, line)
		}
	}
	if len(found) != 1 {
		i.t.Fatalf("the documents have these commands with %q, and not one: %q", part, found)
	}
	i.docs.run[found[0]] = true
	line, _, _ := strings.Cut(found[0], " # ")
	return line
}

// shell runs a command as its reader would.
func (i installation) shell(line string, more ...string) string {
	i.t.Helper()
	for _, m := range more {
		line += " '" + m + "'"
	}
	dir, home := require.Repository(), i.t.TempDir()
	if err := os.Symlink(filepath.Join(dir, "deploy"), filepath.Join(home, "deploy")); err != nil {
		i.t.Fatal(err)
	}
	cmd := exec.CommandContext(i.t.Context(), "bash", "-o", "pipefail", "-c", line)
	cmd.Dir = home
	cmd.Env = append(os.Environ(), "PATH="+filepath.Join(dir, "bin")+":"+require.Kubernetes(i.t)+":"+os.Getenv("PATH"),
		"KUBECONFIG="+i.Kubeconfig, "KUBECACHEDIR="+home, "HELM_CACHE_HOME="+home, "HELM_CONFIG_HOME="+home, "HELM_DATA_HOME="+home)
	out, err := cmd.CombinedOutput()
	if err != nil {
		i.t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return string(out)
}

// explain says what there is, of a cluster in which something is wrong.
func (i installation) explain() {
	i.t.Helper()
	for _, args := range [][]string{
		{"get", "pods", "-A", "-o", "wide"},
		{"describe", "pods", "-n", "meshid"},
		{"get", "events", "-A", "--field-selector=type=Warning"},
		{"logs", "-n", "meshid", "meshid-ca-0", "--tail=40"},
		{"logs", "-n", "meshid", "-l", "app.kubernetes.io/name=meshid-agent", "--tail=40", "--prefix"},
		{"logs", "-n", "shop", "-l", "app=web", "--tail=5", "--prefix"},
		{"describe", "pods", "-n", "bookinfo"},
		{"logs", "-n", "bookinfo", "-l", "app=ratings", "--tail=20", "--prefix"},
	} {
		out, err := i.Kubectl(i.t, args...)
		i.t.Logf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// importImages builds the programs and puts their images onto each node, as
// `make images` makes them.
func (i installation) importImages() {
	i.t.Helper()
	dir := i.t.TempDir()
	images := exec.CommandContext(i.t.Context(), "go", "run", "./scripts/images", local.Binaries(i.t), dir)
	images.Dir = require.Repository()
	if out, err := images.CombinedOutput(); err != nil {
		i.t.Fatalf("%v\n%s", err, out)
	}
	for _, n := range i.Nodes {
		for _, name := range []string{"ca", "node-agent"} {
			if _, err := n.Exec(i.t, "ctr", "--namespace=k8s.io", "images", "import", filepath.Join(dir, name+".tar")); err != nil {
				i.t.Fatal(err)
			}
		}
	}
	program := filepath.Join(dir, "pod")
	build := exec.CommandContext(i.t.Context(), "go", "build", "-o", program, "./pod")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		i.t.Fatalf("%v\n%s", err, out)
	}
	i.ImportImage(i.t, image.Spec{Tag: podImage, Entrypoint: []string{"/pod"}, Files: map[string]string{"/pod": program}})
	i.ImportImage(i.t, image.Spec{Tag: pilotAgentImage, Entrypoint: []string{"/pilot-agent"}, Files: map[string]string{
		"/pilot-agent": require.Tool(i.t, "pilot-agent"), "/busybox": require.Program(i.t, "busybox"),
	}})
}

// provision makes the volume for the CA's claim.
func (i installation) provision(name string) {
	i.t.Helper()
	if _, err := i.Nodes[0].Exec(i.t, "mkdir", "/var/lib/volume-"+name); err != nil {
		i.t.Fatal(err)
	}
	i.Apply(i.t, fmt.Sprintf(volume, name))
}

// report is what a pod says of itself; see the program in the folder pod.
type report struct {
	ID      string        `json:"id"`
	Waited  time.Duration `json:"waited"`
	Life    time.Duration `json:"life"`
	OK      int           `json:"ok"`
	Failed  int           `json:"failed"`
	Problem string        `json:"problem"`
}

// reports asks pods.
func (i installation) reports(pods []kube.RunningPod) []report {
	i.t.Helper()
	all := make([]report, len(pods))
	for at, p := range pods {
		local.Await(i.t, "ask pod "+p.Metadata.Name, func(ctx context.Context) error {
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+p.Status.PodIP+":8080/", nil)
			if err != nil {
				return err
			}
			answer, err := http.DefaultClient.Do(req)
			if err != nil {
				return err
			}
			defer answer.Body.Close()
			return json.NewDecoder(answer.Body).Decode(&all[at])
		})
	}
	return all
}

// named fails the test unless each pod has the identity that is its own.
func (i installation) named(pods []kube.RunningPod, reports []report) {
	i.t.Helper()
	i.namedIn("example.org", pods, reports)
}

func (i installation) namedIn(trustDomain string, pods []kube.RunningPod, reports []report) {
	i.t.Helper()
	for at, p := range pods {
		if want := "spiffe://" + trustDomain + "/ns/shop/sa/web/pod/" + p.Metadata.UID; reports[at].ID != want {
			i.t.Errorf("pod %s on %s has %s, want %s", p.Metadata.Name, p.Spec.NodeName, reports[at].ID, want)
		}
	}
}

// requests waits until each pod has made so many requests more, and fails the test if
// one of a pod's requests failed meanwhile.
func (i installation) requests(pods []kube.RunningPod, before []report, more int) {
	i.t.Helper()
	local.Await(i.t, fmt.Sprintf("%d requests of each pod", more), func(context.Context) error {
		for at, now := range i.reports(pods) {
			if now.Failed > before[at].Failed {
				i.t.Fatalf("%d requests of pod %s failed: %s", now.Failed-before[at].Failed, pods[at].Metadata.Name, now.Problem)
			}
			if done := now.OK - before[at].OK; done < more {
				return fmt.Errorf("pod %s has made %d", pods[at].Metadata.Name, done)
			}
		}
		return nil
	})
}

// objects are all objects of the cluster that are by their names meshid's, or what it
// keeps for Istio.
func (i installation) objects() (found []string) {
	i.t.Helper()
	kinds := strings.Fields(i.MustKubectl(i.t, "api-resources", "--verbs=list,delete", "-o", "name"))
	kinds = slices.DeleteFunc(kinds, func(k string) bool { return strings.HasPrefix(k, "events") })
	all := i.MustKubectl(i.t, "get", strings.Join(kinds, ","), "-A", "-o", `jsonpath={range .items[*]}{.kind}/{.metadata.namespace}/{.metadata.name}{"\n"}{end}`)
	for line := range strings.Lines(all) {
		line = strings.TrimSpace(line)
		if strings.Contains(line, "meshid") || strings.HasSuffix(line, "/istio-ca-root-cert") || strings.HasSuffix(line, "/istiod-tls") {
			found = append(found, line)
		}
	}
	slices.Sort(found)
	return found
}

// files are those that an agent has left on a node.
func (i installation) files(n *kube.Node) string {
	i.t.Helper()
	const find = "cd / && find run var/lib/kubelet var/lib/meshid -path run/containerd -prune -o -name '*meshid*' -prune -print; grep -F csi.meshid.io /proc/mounts; ls /var/lib/kubelet/plugins_registry"
	out, err := n.Exec(i.t, "sh", "-c", find)
	if err != nil {
		i.t.Fatal(err)
	}
	return strings.Join(strings.Fields(out), " ")
}

// certificates reads PEM.
func certificates(t *testing.T, text string) (all []*x509.Certificate) {
	t.Helper()
	for rest := []byte(text); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return all
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, c)
	}
}

// verified fails the test unless a chain is that of a SPIFFE ID, by these roots.
func (i installation) verified(chain, roots, id string) {
	i.t.Helper()
	certs, pool, between := certificates(i.t, chain), x509.NewCertPool(), x509.NewCertPool()
	if len(certs) == 0 {
		i.t.Errorf("%s has no certificate: %q", id, chain)
		return
	}
	pool.AppendCertsFromPEM([]byte(roots))
	for _, c := range certs[1:] {
		between.AddCert(c)
	}
	if _, err := certs[0].Verify(x509.VerifyOptions{Roots: pool, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		i.t.Errorf("%s: %v", id, err)
	}
	if len(certs[0].URIs) != 1 || certs[0].URIs[0].String() != id {
		i.t.Errorf("the certificate is of %v, want %s", certs[0].URIs, id)
	}
}

// console opens the console through the API server, by the command of the documents.
func (i installation) console() {
	i.t.Helper()
	said := i.documented("ca console link")
	link := regexp.MustCompile(`https://\S+`).FindString(said)
	if link == "" {
		i.t.Fatalf("there is no link in %q", said)
	}
	// The port on this machine may be another program's: any other will do.
	line := strings.Replace(i.command("port-forward"), " 8444", " :8444", 1)
	forward := local.Run(i.t, "env", "PATH="+require.Kubernetes(i.t)+":"+os.Getenv("PATH"), "KUBECONFIG="+i.Kubeconfig, "bash", "-c", "exec "+line)
	defer forward.Kill()
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}} // as a browser that was told to go on
	defer client.CloseIdleConnections()
	local.Await(i.t, "open the console", func(ctx context.Context) error {
		_, rest, ok := strings.Cut(forward.Log(), "Forwarding from 127.0.0.1:")
		port, _, ok2 := strings.Cut(rest, " ")
		if !ok || !ok2 {
			return fmt.Errorf("it is not forwarded yet: %s", forward.Log())
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.Replace(link, ":8444", ":"+port, 1), nil)
		if err != nil {
			return err
		}
		answer, err := client.Do(req)
		if err != nil {
			return err
		}
		defer answer.Body.Close()
		text, err := io.ReadAll(answer.Body)
		if err == nil && (answer.StatusCode != http.StatusOK || !strings.Contains(string(text), "meshid")) {
			err = fmt.Errorf("%s: %s", answer.Status, text)
		}
		return err
	})
}

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
			if out := i.documented("kubectl get registrationentries"); !strings.Contains(out, "True") || !strings.Contains(out, "2/2") {
				return errors.New(out)
			}
			return nil
		})
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
	within("an unmodified Istio takes its certificates from the CA", func(i installation) {
		i.documented("kubectl create namespace istio-system")
		i.documented("--set istio.enabled", "--timeout=4m", "--set=trustBundles=true")
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
		i.documented("--set ca.config.console", "--timeout=4m", "--set=agent.csi=false,agent.kubeletSelfSigned=true,agent.nodesProxy=true")
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
