// Package observe holds what is shipped for Prometheus and Grafana against real
// programs: each rule and each query of a dashboard is evaluated by a real
// Prometheus that scrapes a real CA and a real node agent.
package observe

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math"
	"math/big"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secret "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/meshid/meshid/test/fakes/kubeapi"
	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

func TestMain(m *testing.M) { os.Exit(local.Main(m)) } //nolint:forbidigo // as every TestMain

func shipped(t *testing.T, pattern string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(require.Repository(), "deploy", pattern))
	if err != nil || len(files) == 0 {
		t.Fatalf("no files %s: %v", pattern, err)
	}
	return files
}

// The rules are valid, and say what they should when they should.
func TestAlerts(t *testing.T) {
	t.Parallel()
	promtool := require.Program(t, "promtool")
	for _, args := range [][]string{
		append([]string{"check", "rules"}, shipped(t, "prometheus/alerts.yaml")...),
		append([]string{"check", "config"}, shipped(t, "prometheus/prometheus.yaml")...),
		append([]string{"test", "rules"}, shipped(t, "prometheus/*_test.yaml")...),
	} {
		out, err := exec.CommandContext(t.Context(), promtool, args...).CombinedOutput()
		if err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args[:2], " "), err, out)
		}
	}
	// Each alert has a case in which it fires.
	var rules, cases bytes.Buffer
	for _, f := range shipped(t, "prometheus/*.yaml") {
		to := &rules
		if strings.HasSuffix(f, "_test.yaml") {
			to = &cases
		}
		to.Write(read(t, f))
	}
	for _, m := range regexp.MustCompile(`- alert: (\w+)`).FindAllStringSubmatch(rules.String(), -1) {
		if !regexp.MustCompile(`alertname: ` + m[1] + `\n\s+exp_alerts:\n\s+- exp_labels`).Match(cases.Bytes()) {
			t.Errorf("no test in which %s fires", m[1])
		}
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// No rule and no query names a metric that the programs do not have.
func TestNames(t *testing.T) {
	t.Parallel()
	known := make(map[string]bool)
	page := string(read(t, filepath.Join(require.Repository(), "docs", "metrics.md")))
	for _, m := range regexp.MustCompile("`(meshid_[a-z0-9_]+)` \\| (\\w+)").FindAllStringSubmatch(page, -1) {
		known[m[1]] = true
		if m[2] == "histogram" {
			known[m[1]+"_bucket"], known[m[1]+"_sum"], known[m[1]+"_count"] = true, true, true
		}
	}
	for _, f := range append(shipped(t, "prometheus/*.yaml"), shipped(t, "grafana/*.json")...) {
		for _, name := range regexp.MustCompile(`meshid_(ca|agent)_[a-z0-9_]+`).FindAllString(string(read(t, f)), -1) {
			if !known[name] {
				t.Errorf("%s: there is no metric %s", filepath.Base(f), name)
			}
		}
	}
}

// No panel is empty: each query of each dashboard has a value for a mesh in use.
func TestDashboards(t *testing.T) {
	t.Parallel()
	require.Root(t)
	ca := local.StartCA(t, local.CAOptions{Config: upstreamOnDisk(t) + clusterOfAgents(t)})
	agent := ca.StartAgent(t, "node-1", local.AgentOptions{})
	servers := map[string]string{
		"classic": startPrometheus(t, ca.Metrics, agent.Metrics),
		"native":  startPrometheus(t, ca.Metrics, agent.Metrics, "--enable-feature=native-histograms"),
	}
	ca.MustCommand(t, "authority", "rotate") // the upstream CA is asked while they look
	ca.Apply(t, `
- name: proxy
  spiffe_id: spiffe://example.org/proxy
  workloads: unix.uid == 0
  ttl: 20s
  accept_weak: true
`)
	proxy(t, agent.Socket)
	ca.MustCommand(t, "quarantine", "add", "--spiffe-id", "spiffe://example.org/proxy", "--reason", "test", "--wait", "--timeout", "1m")
	ca.MustCommand(t, "quarantine", "lift", "--spiffe-id", "spiffe://example.org/proxy")

	type shown struct {
		Title  string `json:"title"`
		Panels []struct {
			Title   string `json:"title"`
			Targets []struct {
				Expr string `json:"expr"`
			} `json:"targets"`
		} `json:"panels"`
	}
	for _, f := range shipped(t, "grafana/*.json") {
		var d shown
		if err := json.Unmarshal(read(t, f), &d); err != nil {
			t.Fatalf("%s: %v", f, err)
		}
		for _, p := range d.Panels {
			for _, q := range p.Targets {
				expr := strings.NewReplacer("$__rate_interval", "1h", "$instance", ".*").Replace(q.Expr)
				for mode, prometheus := range servers {
					local.Await(t, fmt.Sprintf("%s, %s, %s histograms: %s", d.Title, p.Title, mode, expr), func(ctx context.Context) error {
						return hasValue(ctx, prometheus, expr)
					})
				}
			}
		}
	}
}

// clusterOfAgents returns the settings of a cluster whose agents may attest.
func clusterOfAgents(t *testing.T) string {
	t.Helper()
	return fmt.Sprintf("node_attestation: {join_token: {}, k8s_psat: {clusters: [{name: prod, service_accounts: [meshid/agent], token_review: {kubeconfig: %q}}]}}\n", kubeapi.New(t).Kubeconfig)
}

// upstreamOnDisk makes an upstream CA in files, and returns its settings.
func upstreamOnDisk(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "upstream"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * 365 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	paths := make(map[string]string)
	for kind, der := range map[string][]byte{"CERTIFICATE": cert, "PRIVATE KEY": secret} {
		paths[kind] = filepath.Join(dir, strings.ReplaceAll(kind, " ", "-")+".pem")
		if err := os.WriteFile(paths[kind], pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return fmt.Sprintf("upstream: {disk: {certificate: %q, key: %q}}\n", paths["CERTIFICATE"], paths["PRIVATE KEY"])
}

// hasValue asks Prometheus and wants at least one number.
func hasValue(ctx context.Context, address, expr string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/api/v1/query?query="+url.QueryEscape(expr), nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	var answer struct {
		Error string `json:"error"`
		Data  struct {
			Result []struct {
				Value [2]any `json:"value"`
			} `json:"result"`
		} `json:"data"`
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return fmt.Errorf("%w: %s", err, body)
	}
	if answer.Error != "" {
		return errors.New(answer.Error)
	}
	for _, r := range answer.Data.Result {
		text, _ := r.Value[1].(string)
		if v, err := strconv.ParseFloat(text, 64); err == nil && !math.IsNaN(v) {
			return nil
		}
	}
	return fmt.Errorf("no value among %d", len(answer.Data.Result))
}

// startPrometheus starts one that scrapes both programs each second with the
// shipped rules, and returns its address.
func startPrometheus(t *testing.T, caMetrics, agentMetrics string, flags ...string) string {
	t.Helper()
	program := require.Program(t, "prometheus")
	dir := t.TempDir()
	config := strings.NewReplacer("15s", "1s", "127.0.0.1:9640", caMetrics, "127.0.0.1:9641", agentMetrics,
		"[alerts.yaml]", "["+shipped(t, "prometheus/alerts.yaml")[0]+"]").Replace(string(read(t, shipped(t, "prometheus/prometheus.yaml")[0])))
	path := filepath.Join(dir, "prometheus.yml")
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	address := local.FreeAddress(t)
	local.Run(t, append([]string{
		program, "--config.file=" + path, "--storage.tsdb.path=" + filepath.Join(dir, "data"), "--web.listen-address=" + address,
	}, flags...)...)
	// What happens from here on is an increase of something that was seen before.
	local.Await(t, "wait for Prometheus", func(ctx context.Context) error {
		return hasValue(ctx, address, "up{job='meshid-ca'} * on () up{job='meshid-agent'} == 1")
	})
	return address
}

// proxy is Envoy's half of SDS: it subscribes to its certificate and to the roots,
// and acknowledges whatever comes until the test ends.
func proxy(t *testing.T, socket string) {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	stream, err := secret.NewSecretDiscoveryServiceClient(conn).StreamSecrets(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	request := &discovery.DiscoveryRequest{
		Node: &core.Node{Id: "test"}, ResourceNames: []string{"default", "ROOTCA"},
		TypeUrl: "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
	}
	if err := stream.Send(request); err != nil {
		t.Fatal(err)
	}
	first, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for n := 0; ; n++ {
			answer, err := stream.Recv()
			if err != nil {
				return
			}
			request.VersionInfo, request.ResponseNonce, request.Node = answer.GetVersionInfo(), answer.GetNonce(), nil
			if stream.Send(request) != nil {
				return
			}
			if n == 0 {
				close(first)
			}
		}
	}()
	t.Cleanup(func() {
		_ = conn.Close()
		<-ended
	})
	select {
	case <-first:
	case <-ended:
		t.Fatal("the stream of secrets has ended")
	case <-time.After(time.Minute):
		t.Fatal("no secret came")
	}
}

// The files are what the table of panels says.
func TestGenerated(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), "go", "run", "./deploy/grafana", dir)
	cmd.Dir = require.Repository()
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var names []string
	for _, f := range shipped(t, "grafana/*.json") {
		names = append(names, filepath.Base(f))
		if !bytes.Equal(read(t, f), read(t, filepath.Join(dir, filepath.Base(f)))) {
			t.Errorf("%s is not what it should be; run make generate", filepath.Base(f))
		}
	}
	made, err := filepath.Glob(filepath.Join(dir, "*.json"))
	if err != nil || len(made) != len(names) {
		t.Errorf("%d dashboards are generated, %d are there: %v %v", len(made), len(names), slices.Sorted(slices.Values(names)), err)
	}
}
