package helm

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
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

// snapshot copies a volume, in which the CA is, as a snapshot does: in one moment. The
// copy is there for a claim.
func (i installation) snapshot(from, to string) {
	i.t.Helper()
	ca := i.AwaitPods(i.t, "meshid", "app.kubernetes.io/name=meshid-ca", 1)[0]
	signal := func(s syscall.Signal) {
		for _, pid := range i.PIDs(i.t, ca, "ca") {
			if err := syscall.Kill(pid, s); err != nil {
				i.t.Fatal(err)
			}
		}
	}
	signal(syscall.SIGSTOP)
	defer signal(syscall.SIGCONT)
	if _, err := i.Nodes[0].Exec(i.t, "cp", "-a", "/var/lib/volume-"+from, "/var/lib/volume-"+to); err != nil {
		i.t.Fatal(err)
	}
	i.Apply(i.t, fmt.Sprintf(volume, to))
}

// inForce waits until entries are in force on all nodes.
func (i installation) inForce(names ...string) {
	i.t.Helper()
	for _, name := range names {
		i.MustKubectl(i.t, "wait", "registrationentry/"+name, "--for=condition=InForce", "--timeout=110s")
	}
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
