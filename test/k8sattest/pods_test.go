package k8sattest

import (
	"bufio"
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshid/meshid/pkg/agent"
	testkube "github.com/meshid/meshid/test/kube"
	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
	"github.com/meshid/meshid/test/shop/image"
)

// Both programs in a whole cluster: pods that come and go have the identities that are
// theirs, and nobody else's, from their first instruction on. How long each waited, and
// what it cost, is printed; docs/performance.md has the figures.

// size says how much is done.
type size struct {
	rounds             int // of 40 pods that start and stop
	single, containers int // pods that start one after another, and containers in each, one after another
	processes          int // new ones in a container that runs
	fake               int // pods that kwok plays
}

func TestClusterPodsComeAndGo(t *testing.T) {
	comeAndGo(t, size{rounds: 1, single: 2, containers: 4, processes: 3}, func(name string, v float64) { t.Logf("%10.2f %s", v, name) })
}

// BenchmarkClusterPods is the same with more of it, and beside 2,000 pods on 20 nodes
// that kwok plays.
func BenchmarkClusterPods(b *testing.B) {
	for b.Loop() {
		comeAndGo(b, size{rounds: 4, single: 6, containers: 10, processes: 60, fake: 2000}, func(name string, v float64) {
			b.Logf("%10.2f %s", v, name)
			b.ReportMetric(v, name)
		})
	}
	b.ReportMetric(0, "ns/op")
}

// audit has the API server write down whose TokenReviews it answers: the kubelets ask
// too, about the token that the agent shows them.
const audit = `
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- {level: Metadata, resources: [{group: authentication.k8s.io, resources: [tokenreviews]}]}
- {level: None}
`

const probeImage = "meshid.test/probe:1"

// fleet is a cluster with a CA and an agent on each of its nodes.
type fleet struct {
	*testkube.Cluster
	t      testing.TB
	ca     *local.CA
	agents []*local.Agent // of the nodes, in their order
	audit  string
}

func startFleet(t testing.TB) *fleet {
	t.Helper()
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	f := &fleet{t: t, audit: filepath.Join(dir, "audit.log")}
	f.Cluster = testkube.StartCluster(t, testkube.Options{Nodes: 2, APIServerArgs: []string{
		"--audit-policy-file=" + write("audit.yaml", audit), "--audit-log-path=" + f.audit,
	}})
	program := filepath.Join(dir, "probe")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", program, "./test/bench/client")
	build.Dir, build.Env = require.Repository(), append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the probe: %v\n%s", err, out)
	}
	f.ImportImage(t, image.Spec{Tag: probeImage, Entrypoint: []string{"/probe"}, Files: map[string]string{"/probe": program}})
	f.Account(t, "meshid", "agent")
	f.Apply(t, agentRights("meshid", "agent")+caRights)
	f.ca = local.StartCA(t, local.CAOptions{Listen: net.JoinHostPort(f.HostIP, "8443"), Config: fmt.Sprintf(`
kubernetes:
  clusters: [{name: prod, kubeconfig: %q}]
node_attestation:
  k8s_psat: {clusters: [{name: prod, service_accounts: [meshid/agent], token_review: {}}]}
`, f.UserKubeconfig(t, "ca"))})
	f.ca.Apply(t, `
- name: pods
  spiffe_id: spiffe://example.org/ns/{k8s.namespace}/sa/{k8s.service_account}/pod/{k8s.pod_uid}
  workloads: k8s.namespace.startsWith("team-")
`)
	for _, n := range f.Nodes {
		// The pod whose token the agent has.
		f.Apply(t, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: agent-%[1]s, namespace: meshid, labels: {app: %[1]s}}
spec:
  nodeName: %[1]s
  serviceAccountName: agent
  terminationGracePeriodSeconds: 1
  containers: [{name: agent, image: %[2]s, command: [/bin/sh, -c, busybox sleep 100000]}]
`, n.Name, testkube.BusyBox))
	}
	for _, n := range f.Nodes {
		pod := f.AwaitPods(t, "meshid", "app="+n.Name, 1)[0]
		own := testkube.Pod{Namespace: "meshid", Name: pod.Metadata.Name, ServiceAccount: "agent", UID: pod.Metadata.UID}
		f.agents = append(f.agents, f.ca.LaunchAgent(t, n.Name, local.AgentOptions{
			NodeAttestation: fmt.Sprintf("{k8s_psat: {cluster: prod, token_file: %q}}", write("psat-"+n.Name, f.Token(t, own, time.Hour, "meshid"))),
			Config: fmt.Sprintf("workload_attestation: {k8s: {kubelet: 'https://%s:10250', node_name: %s, kubelet_ca: %q, token_file: %q}}",
				n.IP, n.Name, f.CAFile, write("kubelet-"+n.Name, f.Token(t, own, 24*time.Hour))),
			Wrap: n.Enter("setpriv", "--pdeathsig", "KILL"), // what enters the node's process ids is the parent of what runs there
		}))
	}
	for i := range f.agents {
		f.await("wait for the agent", func(context.Context) error {
			s, err := f.status(i)
			if err == nil && (!s.Connected || s.Entries == 0) {
				err = fmt.Errorf("connected: %v (%s), %d entries", s.Connected, s.LastError, s.Entries)
			}
			return err
		})
	}
	return f
}

// status asks an agent how it is, on its node: it answers nobody whose process id it
// cannot know.
func (f *fleet) status(agentOf int) (*agent.Status, error) {
	a := f.agents[agentOf]
	out, err := f.Nodes[agentOf].Exec(f.t, filepath.Join(local.Binaries(f.t), "node-agent"), "status", "-o", "json", "--admin-socket", a.AdminSocket)
	if err != nil {
		return nil, err
	}
	s := &agent.Status{}
	return s, json.Unmarshal([]byte(out), s)
}

// reviews counts the TokenReviews that a user has asked for.
func (f *fleet) reviews(user string) (n int) {
	f.t.Helper()
	file, err := os.Open(f.audit)
	if err != nil {
		f.t.Fatal(err)
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		var e struct {
			User struct {
				Username string `json:"username"`
			} `json:"user"`
		}
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			continue // being written
		}
		if e.User.Username == user {
			n++
		}
	}
	return n
}

// await waits for what takes minutes on a machine that is busy.
func (f *fleet) await(what string, done func(context.Context) error) {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), 5*time.Minute)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		err := done(ctx)
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			f.t.Fatalf("%s: %v", what, err)
		}
	}
}

// pods waits until so many pods of a namespace are ready, and there is no other.
func (f *fleet) pods(namespace string, want int) (pods []testkube.RunningPod) {
	f.t.Helper()
	f.await(fmt.Sprintf("wait for %d pods in %s", want, namespace), func(ctx context.Context) error {
		var list struct {
			Items []testkube.RunningPod `json:"items"`
		}
		if err := f.Do(ctx, http.MethodGet, "/api/v1/namespaces/"+namespace+"/pods", nil, &list); err != nil {
			return err
		}
		pods = list.Items
		ready := 0
		for _, p := range pods {
			if p.Ready() {
				ready++
			}
		}
		if ready != want || len(pods) != want {
			return fmt.Errorf("there are %d, ready are %d", len(pods), ready)
		}
		return nil
	})
	return pods
}

// first reads what a probe has said: how long it waited. Its certificate must be that of
// the pod.
func (f *fleet) first(said, namespace, account, uid string) (time.Duration, error) {
	_, line, ok := strings.Cut(said, "secret ")
	if !ok || !strings.HasSuffix(line, "\n") {
		return 0, fmt.Errorf("it has no secret yet: %q", said)
	}
	var begin, end int64
	var leaf string
	if _, err := fmt.Sscanf(line, "%d %d %s", &begin, &end, &leaf); err != nil {
		return 0, fmt.Errorf("%q: %w", line, err)
	}
	der, err := base64.StdEncoding.DecodeString(leaf)
	if err != nil {
		return 0, err
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return 0, err
	}
	want := fmt.Sprintf("spiffe://%s/ns/%s/sa/%s/pod/%s", local.TrustDomain, namespace, account, uid)
	if len(c.URIs) != 1 || c.URIs[0].String() != want {
		f.t.Errorf("a pod has the identity %v, its own is %s", c.URIs, want)
	}
	return time.Duration(end - begin), nil
}

// waited waits for the secret of a pod's container, and returns how long it waited.
func (f *fleet) waited(namespace, account string, p testkube.RunningPod, container string) (d time.Duration) {
	f.t.Helper()
	f.await("wait for the secret of "+p.Metadata.Name, func(ctx context.Context) error {
		var log []byte
		err := f.Do(ctx, http.MethodGet, "/api/v1/namespaces/"+namespace+"/pods/"+p.Metadata.Name+"/log?container="+container, nil, &log)
		if err == nil {
			d, err = f.first(string(log), namespace, account, p.Metadata.UID)
		}
		return err
	})
	return d
}

// held are the identities that an agent holds keys of.
func held(s *agent.Status) (ids []string) {
	for _, i := range s.Instances {
		for _, id := range i.Identities {
			ids = append(ids, id.SPIFFEID)
		}
	}
	return ids
}

// nothingHeld waits until no agent holds the key of a pod.
func (f *fleet) nothingHeld() {
	f.t.Helper()
	for i := range f.agents {
		f.await("no key is left", func(context.Context) error {
			s, err := f.status(i)
			if err == nil && (len(held(s)) > 0 || s.Streams > 0) {
				err = fmt.Errorf("%d streams, and keys of %v", s.Streams, held(s))
			}
			return err
		})
	}
}

// pids are the processes of the agents, and of the CA.
func (f *fleet) pids() (agents []int, ca int) {
	f.t.Helper()
	for _, a := range f.agents {
		children, err := os.ReadFile(fmt.Sprintf("/proc/%[1]d/task/%[1]d/children", a.PID()))
		if err != nil {
			f.t.Fatal(err)
		}
		pid, err := strconv.Atoi(strings.TrimSpace(string(children)))
		if err != nil {
			f.t.Fatal(err)
		}
		agents = append(agents, pid)
	}
	return agents, f.ca.PID()
}

// processorTime is what a process has used.
func (f *fleet) processorTime(pid int) time.Duration {
	f.t.Helper()
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|2), &ts); err != nil { // CPUCLOCK_SCHED of the process, clock_getcpuclockid(3)
		f.t.Fatal(err)
	}
	return time.Duration(ts.Nano())
}

// usage is what agents and CA have used of the processors.
func (f *fleet) usage() (agents []time.Duration, ca time.Duration) {
	f.t.Helper()
	pids, pid := f.pids()
	for _, p := range pids {
		agents = append(agents, f.processorTime(p))
	}
	return agents, f.processorTime(pid)
}

// metrics are those of the programs, by the name of a series: of the agents the sum.
type metrics map[string]float64

// metrics asks all programs.
func (f *fleet) metrics() metrics {
	f.t.Helper()
	text, err := exec.CommandContext(f.t.Context(), "busybox", "wget", "-q", "-O", "-", "http://"+f.ca.Metrics+"/metrics").Output()
	if err != nil {
		f.t.Fatal(err)
	}
	all := []string{string(text)}
	for i, a := range f.agents {
		text, err := f.Nodes[i].Exec(f.t, "busybox", "wget", "-q", "-O", "-", "http://"+a.Metrics+"/metrics")
		if err != nil {
			f.t.Fatal(err)
		}
		all = append(all, text)
	}
	m := make(metrics)
	for _, text := range all {
		for line := range strings.Lines(text) {
			name, value, ok := strings.Cut(strings.TrimSpace(line), " ")
			if v, err := strconv.ParseFloat(value, 64); ok && err == nil {
				m[name] += v
			}
		}
	}
	return m
}

// since returns how much a series has grown.
func (m metrics) since(t testing.TB, before metrics, series string) float64 {
	t.Helper()
	now, ok := m[series]
	if !ok {
		t.Fatalf("there is no %s", series)
	}
	return now - before[series]
}

// steps are the histograms of the way to a pod's certificate. Those of the agents are
// over what happens in one program after the other: what comes before a process connects
// is not waited for.
var steps = []struct{ name, histogram, labels string }{
	{"step-announced-ms", "meshid_agent_k8s_announcement_seconds", ""},
	{"step-attested-ms", "meshid_agent_workload_attestation_seconds", `{method="k8s"}`},
	{"step-asked-CA-ms", "meshid_agent_issue_seconds", ""},
	{"step-first-SVID-ms", "meshid_agent_first_svid_seconds", ""},
	{"CA-request-ms", "meshid_ca_issue_duration_seconds", ""},
	{"CA-disk-ms", "meshid_ca_ledger_fsync_duration_seconds", ""},
	{"CA-placement-ms", "meshid_ca_placement_duration_seconds", ""},
}

// volume is the agent's socket in a pod of a node.
func (f *fleet) volume(node int) string {
	return fmt.Sprintf("{name: meshid, hostPath: {path: %s, type: Socket}}", f.agents[node].Socket)
}

const mount = "volumeMounts: [{name: meshid, mountPath: /run/meshid/agent.sock}]"

// comeAndGo does it all.
func comeAndGo(t testing.TB, s size, report func(name string, v float64)) {
	f := startFleet(t)
	if s.fake > 0 {
		f.StartFakeNodes(t, s.fake/100, s.fake)
	}
	quantiles := func(name string, waits []time.Duration) {
		slices.Sort(waits)
		at := func(q float64) float64 {
			return float64(waits[min(int(q*float64(len(waits))), len(waits)-1)].Microseconds()) / 1000
		}
		report(name+"-p50-ms", at(0.5))
		report(name+"-p99-ms", at(0.99))
		report(name+"-number", float64(len(waits)))
	}

	if n := f.reviews("ca"); n != len(f.agents) {
		t.Errorf("%d agents have attested, and the CA has asked for %d TokenReviews", len(f.agents), n)
	}

	// One after another: the first container of a pod connects with its first
	// instruction, and so do the next, when the kubelet has told of the pod.
	var event, known, again []time.Duration
	f.Account(t, "team-single", "web")
	for i := range s.single {
		node := i % len(f.Nodes)
		var before strings.Builder
		for c := range s.containers - 1 {
			fmt.Fprintf(&before, "  - {name: c%d, image: %s, args: [/run/meshid/agent.sock, default, '61440', once], %s}\n", c, probeImage, mount)
		}
		name := fmt.Sprint("single-", i)
		f.Apply(t, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: team-single}
spec:
  nodeName: %s
  serviceAccountName: web
  terminationGracePeriodSeconds: 1
  initContainers:
%s  containers:
  - {name: app, image: %s, args: [/run/meshid/agent.sock, default, '61440'], %s}
  volumes: [%s]
`, name, f.Nodes[node].Name, before.String(), probeImage, mount, f.volume(node)))
		p := f.pods("team-single", 1)[0]
		event = append(event, f.waited("team-single", "web", p, "c0"))
		for c := 1; c < s.containers-1; c++ {
			known = append(known, f.waited("team-single", "web", p, fmt.Sprint("c", c)))
		}
		known = append(known, f.waited("team-single", "web", p, "app"))
		for range (s.processes + s.single - 1) / s.single {
			said := f.MustKubectl(t, "exec", "-n", "team-single", name, "--", "/probe", "/run/meshid/agent.sock", "default", "61440", "once")
			d, err := f.first(said, "team-single", "web", p.Metadata.UID)
			if err != nil {
				t.Fatal(err)
			}
			again = append(again, d)
		}
		f.MustKubectl(t, "delete", "pod", "-n", "team-single", name)
	}
	quantiles("new-process", again)
	quantiles("new-container", known)
	quantiles("new-pod", event)
	f.nothingHeld()

	// Forty at once, on both nodes, again and again. Each asks for half of the processor
	// that Istio's sidecars ask for: one that asks for none runs when nobody else wants to,
	// and what it waits for is not the agent.
	const replicas = 10
	type deployment struct{ namespace, account string }
	var all []deployment
	for i := range 4 {
		d := deployment{fmt.Sprint("team-", i/2), fmt.Sprint("sa-", i%2)}
		d.namespace += "-" + d.account
		all = append(all, d)
		f.Account(t, d.namespace, d.account)
		node := i % len(f.Nodes)
		f.Apply(t, fmt.Sprintf(`
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: %s}
spec:
  replicas: 0
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      nodeSelector: {kubernetes.io/hostname: %s}
      serviceAccountName: %s
      terminationGracePeriodSeconds: 1
      containers:
      - {name: app, image: %s, args: [/run/meshid/agent.sock, default, '61440'], resources: {requests: {cpu: 50m}}, %s}
      volumes: [%s]
`, d.namespace, f.Nodes[node].Name, d.account, probeImage, mount, f.volume(node)))
	}
	scale := func(to int) {
		for _, d := range all {
			if err := f.Do(t.Context(), http.MethodPatch, "/apis/apps/v1/namespaces/"+d.namespace+"/deployments/web", map[string]any{"spec": map[string]any{"replicas": to}}, nil); err != nil {
				t.Fatal(err)
			}
		}
	}
	var together []time.Duration
	reviews := f.reviews("ca")
	before := f.metrics()
	began := time.Now()
	used, usedCA := f.usage()
	for range s.rounds {
		scale(replicas)
		for _, d := range all {
			for _, p := range f.pods(d.namespace, replicas) {
				together = append(together, f.waited(d.namespace, d.account, p, "app"))
				for _, c := range p.Status.Containers {
					if c.RestartCount > 0 {
						said, err := f.Kubectl(t, "logs", "-n", d.namespace, p.Metadata.Name, "--previous")
						t.Errorf("the container of pod %s was started again, was it not served? It ended as %v, and said %q (%v)", p.Metadata.Name, c.LastState, said, err)
					}
				}
			}
		}
		scale(0)
		for _, d := range all {
			f.pods(d.namespace, 0)
		}
		f.nothingHeld()
	}
	took := time.Since(began)
	quantiles("40-pods", together)
	var most, sum time.Duration
	nowUsed, nowCA := f.usage()
	for i, now := range nowUsed {
		most, sum = max(most, now-used[i]), sum+now-used[i]
	}
	after := f.metrics()
	for _, s := range steps {
		report(s.name, 1000*after.since(t, before, s.histogram+"_sum"+s.labels)/after.since(t, before, s.histogram+"_count"+s.labels))
	}
	at := after.since(t, before, `meshid_agent_first_svid_seconds_bucket{le="0.01"}`)
	report("step-first-SVID-within-10-ms", at/after.since(t, before, "meshid_agent_first_svid_seconds_count"))
	report("CA-cpu-ms/pod", (nowCA-usedCA).Seconds()*1000/float64(len(together)))
	report("agent-cores", most.Seconds()/took.Seconds())
	report("agent-cpu-ms/pod", sum.Seconds()*1000/float64(len(together)))
	calls := func(call string) float64 {
		return after.since(t, before, fmt.Sprintf("meshid_agent_k8s_calls_total{call=%q,outcome=\"ok\"}", call)) / float64(len(together))
	}
	report("kubelet-polls/pod", calls("kubelet_pods"))
	report("runtime-questions/pod", calls("runtime_container_status"))
	report("pods/s", float64(len(together))/took.Seconds())
	if n := f.reviews("ca"); n != reviews {
		t.Errorf("the CA has asked for %d TokenReviews because of pods", n-reviews)
	}
	byKubelets := 0
	for _, n := range f.Nodes {
		byKubelets += f.reviews("system:node:" + n.Name)
	}
	report("TokenReviews-CA", float64(f.reviews("ca")))
	report("TokenReviews-kubelets", float64(byKubelets))

	f.realEnvoys()
}

// realEnvoys has real Envoys as sidecars on both nodes: each has the certificate of its
// own pod.
func (f *fleet) realEnvoys() {
	f.t.Helper()
	tag := f.ImportEnvoy(f.t)
	const bootstrap = `
node: {id: sidecar, cluster: test}
admin: {address: {socket_address: {address: 0.0.0.0, port_value: 9901}}}
static_resources:
  clusters:
  - name: node_agent
    typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {"@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: {http2_protocol_options: {}}}}
    load_assignment: {cluster_name: node_agent, endpoints: [{lb_endpoints: [{endpoint: {address: {pipe: {path: /run/meshid/agent.sock}}}}]}]}
  listeners:
  - name: server
    address: {socket_address: {address: 0.0.0.0, port_value: 8443}}
    filter_chains:
    - transport_socket: {name: tls, typed_config: {"@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext, common_tls_context: {tls_certificate_sds_secret_configs: [{name: default, sds_config: {resource_api_version: V3, initial_fetch_timeout: 0s, api_config_source: {api_type: GRPC, transport_api_version: V3, grpc_services: [{envoy_grpc: {cluster_name: node_agent}}]}}}]}}}
      filters: [{name: envoy.filters.network.echo, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.network.echo.v3.Echo}}]
`
	f.Account(f.t, "team-envoy", "web")
	for i, n := range f.Nodes {
		f.Apply(f.t, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: envoy-%[1]s, namespace: team-envoy}
spec:
  nodeName: %[1]s
  serviceAccountName: web
  terminationGracePeriodSeconds: 1
  containers:
  - name: envoy
    image: %[2]s
    args: [--config-yaml, %[3]q, --concurrency, "1"]
    securityContext: {runAsUser: 1337}
    readinessProbe: {httpGet: {port: 9901, path: /ready}, periodSeconds: 1}
    %[4]s
  volumes: [%[5]s]
`, n.Name, tag, bootstrap, mount, f.volume(i)))
	}
	for _, p := range f.pods("team-envoy", len(f.Nodes)) {
		f.await("wait for the certificate of "+p.Metadata.Name, func(ctx context.Context) error {
			return f.envoyHas(ctx, p, fmt.Sprintf("spiffe://%s/ns/team-envoy/sa/web/pod/%s", local.TrustDomain, p.Metadata.UID))
		})
	}
	f.MustKubectl(f.t, "delete", "pod", "-n", "team-envoy", "--all")
	f.nothingHeld()
}

// envoyHas asks an Envoy for its certificate.
func (f *fleet) envoyHas(ctx context.Context, p testkube.RunningPod, want string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+net.JoinHostPort(p.Status.PodIP, "9901")+"/certs", nil)
	if err != nil {
		return err
	}
	answer, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	var certs struct {
		Certificates []struct {
			Chain []struct {
				Names []struct {
					URI string `json:"uri"`
				} `json:"subject_alt_names"`
			} `json:"cert_chain"`
		} `json:"certificates"`
	}
	if err := json.NewDecoder(answer.Body).Decode(&certs); err != nil {
		return err
	}
	if len(certs.Certificates) == 0 || len(certs.Certificates[0].Chain) == 0 || len(certs.Certificates[0].Chain[0].Names) == 0 {
		return errors.New("it has none yet")
	}
	if got := certs.Certificates[0].Chain[0].Names[0].URI; got != want {
		return fmt.Errorf("it has %s, want %s", got, want)
	}
	return nil
}
