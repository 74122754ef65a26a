package helm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
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
	podImage = "meshid.test/pod:1"
	// caIP is the address of the CA's Service: the cluster of the tests has no DNS.
	caIP, webIP = "10.96.7.8", "10.96.7.9"
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

// volume is what a provisioner would make for the CA's claim.
const volume = `
apiVersion: v1
kind: PersistentVolume
metadata: {name: ca}
spec:
  capacity: {storage: 8Gi}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  local: {path: /var/lib/volume}
  nodeAffinity:
    required: {nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [node-1]}]}]}
`

// installation is meshid in a cluster.
type installation struct {
	*kube.Cluster
	t *testing.T
}

// documented runs the command of docs/kubernetes.md that begins so, with more arguments,
// and returns what it prints.
func (i installation) documented(begin string, more ...string) string {
	i.t.Helper()
	page, err := os.ReadFile(filepath.Join(require.Repository(), "docs", "kubernetes.md"))
	if err != nil {
		i.t.Fatal(err)
	}
	for line := range strings.Lines(string(page)) {
		if !strings.HasPrefix(line, begin) {
			continue
		}
		args := append(strings.Fields(line), more...)
		dir, home := require.Repository(), i.t.TempDir()
		cmd := exec.CommandContext(i.t.Context(), "env", append([]string{"-C", dir, "PATH=" + filepath.Join(dir, "bin") + ":" + require.Kubernetes(i.t) + ":" + os.Getenv("PATH")}, args...)...)
		cmd.Env = append(os.Environ(), "KUBECONFIG="+i.Kubeconfig, "KUBECACHEDIR="+home, "HELM_CACHE_HOME="+home, "HELM_CONFIG_HOME="+home, "HELM_DATA_HOME="+home)
		out, err := cmd.CombinedOutput()
		if err != nil {
			i.t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	i.t.Fatalf("docs/kubernetes.md has no command %q", begin)
	return ""
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
	for at, p := range pods {
		if want := "spiffe://example.org/ns/shop/sa/web/pod/" + p.Metadata.UID; reports[at].ID != want {
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

// objects are all objects of the cluster that are meshid's by their names.
func (i installation) objects() (found []string) {
	i.t.Helper()
	kinds := strings.Fields(i.MustKubectl(i.t, "api-resources", "--verbs=list,delete", "-o", "name"))
	kinds = slices.DeleteFunc(kinds, func(k string) bool { return strings.HasPrefix(k, "events") })
	all := i.MustKubectl(i.t, "get", strings.Join(kinds, ","), "-A", "-o", `jsonpath={range .items[*]}{.kind}/{.metadata.namespace}/{.metadata.name}{"\n"}{end}`)
	for line := range strings.Lines(all) {
		if line = strings.TrimSpace(line); strings.Contains(line, "meshid") {
			found = append(found, line)
		}
	}
	slices.Sort(found)
	return found
}

// Installed by `helm install`, meshid gives every pod its own identity, stays when nodes
// are cut off and values change, and leaves nothing but what is meant to stay.
func TestClusterInstall(t *testing.T) {
	require.Tool(t, "helm")
	i := installation{kube.StartCluster(t, kube.Options{Nodes: 2, KubeProxy: true}), t}
	defer func() { // and not a Cleanup, before which calls end
		if t.Failed() {
			i.explain()
		}
	}()
	i.importImages()
	if _, err := i.Nodes[0].Exec(t, "mkdir", "/var/lib/volume"); err != nil {
		t.Fatal(err)
	}
	i.Apply(t, volume)
	i.documented("helm install", "--timeout=4m", "--values="+values(t, `
ca: {service: {clusterIP: `+caIP+`}}
agent: {caAddress: '`+caIP+`:8443'}
`))
	i.AwaitPods(t, "meshid", "app.kubernetes.io/name=meshid-agent", 2)

	within := func(name string, f func(i installation)) {
		t.Run(name, func(t *testing.T) { f(installation{i.Cluster, t}) })
		if t.Failed() {
			t.FailNow() // what follows needs it
		}
	}
	within("agents attest", func(i installation) {
		uids := strings.Fields(i.MustKubectl(i.t, "get", "nodes", "-o", "jsonpath={.items[*].metadata.uid}"))
		local.Await(i.t, "all nodes attest", func(context.Context) error {
			nodes := i.documented("kubectl -n meshid exec meshid-ca-0 -- ca node list")
			for _, uid := range uids {
				if !strings.Contains(nodes, "/k8s_psat/kubernetes."+uid) {
					return fmt.Errorf("node %s is not there:\n%s", uid, nodes)
				}
			}
			return nil
		})
	})
	within("nothing is found wrong", func(i installation) {
		i.t.Log(i.documented("kubectl -n meshid exec meshid-ca-0 -- ca k8s check"))
		i.t.Log(i.documented("kubectl -n meshid exec daemonset/meshid-agent -- node-agent check"))
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
	within("a node is cut off and healed", func(i installation) {
		n := i.Nodes[1]
		n.Disconnect(i.t)
		n.AwaitReady(i.t, false)
		n.Connect(i.t)
		n.AwaitReady(i.t, true)
		i.AwaitPods(i.t, "meshid", "app.kubernetes.io/name=meshid-agent", 2)
		i.MustKubectl(i.t, "rollout", "restart", "-n", "shop", "deployment/web")
		i.MustKubectl(i.t, "rollout", "status", "-n", "shop", "deployment/web", "--timeout=110s")
		pods = i.AwaitPods(i.t, "shop", "app=web", 4)
		i.named(pods, i.reports(pods))
	})
	within("an upgrade changes a value", func(i installation) {
		before := i.reports(pods)
		agents := i.AwaitPods(i.t, "meshid", "app.kubernetes.io/name=meshid-agent", 2)
		i.documented("helm upgrade", "--timeout=4m")
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
	})
	within("without CSI, agents are not privileged", func(i installation) {
		i.MustKubectl(i.t, "delete", "namespace", "shop", "--timeout=110s")
		i.documented("helm upgrade", "--timeout=4m", "--set=agent.csi=false")
		i.AwaitPods(i.t, "meshid", "app.kubernetes.io/name=meshid-agent", 2)
		if out := i.MustKubectl(i.t, "get", "pods", "-n", "meshid", "-o", "jsonpath={.items[*].spec.containers[*].securityContext}"); strings.Contains(out, "privileged") {
			i.t.Errorf("a container is: %s", out)
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
			"APIService//v1alpha1.meshid.io",
			"PersistentVolumeClaim/meshid/data-meshid-ca-0",
		}
		local.Await(i.t, "all is gone that does not stay", func(context.Context) error {
			left := slices.DeleteFunc(i.objects(), func(o string) bool { return slices.Contains(stays, o) })
			if len(left) > 0 {
				return errors.New(strings.Join(left, " "))
			}
			return nil
		})
		for _, n := range i.Nodes {
			out, err := n.Exec(i.t, "sh", "-c", "grep -F csi.meshid.io /proc/mounts; ls /var/lib/kubelet/plugins_registry")
			if err != nil || out != "" {
				i.t.Errorf("left on %s: %s (%v)", n.Name, out, err)
			}
		}
	})
}
