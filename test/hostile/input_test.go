package hostile

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

// frugal runs a program with 384 MB of memory, of which Go's runtime takes its
// part, and fails the test if it panics, for want of memory too, works for long or
// prints without end.
func frugal(t *testing.T, args ...string) (printed string, err error) {
	t.Helper()
	shell := append(wrap("ulimit -d 393216", ""), args...)
	cmd := exec.CommandContext(t.Context(), shell[0], shell[1:]...)
	out, err := cmd.CombinedOutput()
	if took := cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(); took > 10*time.Second {
		t.Errorf("%v took %v of a processor", args, took)
	}
	if strings.Contains(string(out), "goroutine ") {
		t.Errorf("%v panicked: %.2000s", args, out)
	}
	if len(out) > 64<<10 {
		t.Errorf("%v prints %d bytes", args, len(out))
	}
	return string(out), err
}

// Files that are small and become large, deep or slow: entries, configuration,
// bundles. Each is refused with a reason, with little memory and soon.
func TestV_I4_Bombs(t *testing.T) {
	t.Parallel()
	require.Root(t)
	ca := local.StartCA(t, local.CAOptions{})
	dir := t.TempDir()
	path := filepath.Join(dir, "bomb")
	entry := func(field, value string) string {
		fields := map[string]string{"name": "x", "spiffe_id": "spiffe://example.org/x", "workloads": "unix.uid == 1", field: value}
		var b strings.Builder
		for _, k := range []string{"name", "spiffe_id", "workloads", "nodes", "ttl", "dns_names", "hint"} {
			if v, ok := fields[k]; ok {
				fmt.Fprintf(&b, "  %s: %s\n", k, v)
			}
		}
		return "- " + strings.TrimPrefix(b.String(), "  ")
	}
	laughs := "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
	for c := 'b'; c < 'k'; c++ {
		laughs += fmt.Sprintf("%c: &%c [%s]\n", c, c, strings.TrimSuffix(strings.Repeat(fmt.Sprintf("*%c, ", c-1), 10), ", "))
	}
	for name, content := range map[string]string{
		"aliases":              laughs,
		"merge keys":           "a: &a {b: c}\nd: {<<: *a}\n",
		"deep sequence":        strings.Repeat("[", 100_000),
		"deep mapping":         strings.Repeat("{a: ", 100_000),
		"deep block":           strings.Repeat("- ", 100_000) + "x\n",
		"too large":            strings.Repeat("# comment\n", 1<<20),
		"long line":            "a: " + strings.Repeat("x", 4<<20),
		"many documents":       strings.Repeat("---\nname: x\n", 500_000),
		"NUL":                  "- {name: \"a\\0b\", spiffe_id: x}\n",
		"long rule":            entry("workloads", strings.Repeat("unix.uid == 1 || ", 100_000)+"true"),
		"deep rule":            entry("workloads", strings.Repeat("(", 10_000)+"true"+strings.Repeat(")", 10_000)),
		"deep rule of nots":    entry("workloads", "'"+strings.Repeat("!", 20_000)+"true'"),
		"deep list in a rule":  entry("workloads", "'"+strings.Repeat("[", 5_000)+strings.Repeat("]", 5_000)+" == []'"),
		"comprehensions":       entry("workloads", "'"+strings.Repeat("[1,2,3,4,5,6,7,8,9].all(x, ", 12)+"true"+strings.Repeat(")", 12)+"'"),
		"slow expression":      entry("workloads", `'"`+strings.Repeat("a", 3000)+`".matches("(a*)*(a*)*b{1000}{1000}")'`),
		"many templates":       entry("spiffe_id", "spiffe://example.org"+strings.Repeat("/{string(unix.uid)}", 20_000)),
		"open template":        entry("spiffe_id", "'spiffe://example.org/{'"),
		"templates in another": entry("spiffe_id", "'spiffe://example.org/"+strings.Repeat("{", 5_000)+"'"),
		"many names":           entry("dns_names", "["+strings.Repeat("a.example.org, ", 100_000)+"b]"),
		"long TTL":             entry("ttl", "9999999999999999h"),
	} {
		must(t, os.WriteFile(path, []byte(content), 0o600))
		out, err := frugal(t, filepath.Join(local.Binaries(t), "ca"), "entry", "apply", "-f", path, "--admin-socket", ca.AdminSocket)
		if err == nil {
			t.Errorf("%s is applied: %.200s", name, out)
		}
	}
	list, err := ca.Admin.ListEntries(t.Context(), &adminv1.ListEntriesRequest{})
	must(t, err)
	if n := len(list.GetEntries()); n > 0 {
		t.Errorf("%d entries are there", n)
	}
	// The command could be left out: the CA itself refuses them too.
	for name, e := range map[string]*entryv1.Entry{
		"rule":     {Name: "x", SpiffeId: "spiffe://example.org/x", Workloads: strings.Repeat("(", 100_000) + "true" + strings.Repeat(")", 100_000)},
		"nots":     {Name: "x", SpiffeId: "spiffe://example.org/x", Workloads: strings.Repeat("!", 1<<20) + "true"},
		"name":     {Name: strings.Repeat("x", 1<<20), SpiffeId: "spiffe://example.org/x", Workloads: "unix.uid == 1"},
		"template": {Name: "x", SpiffeId: "spiffe://example.org/" + strings.Repeat("{unix.uid}", 100_000), Workloads: "unix.uid == 1"},
		"names":    {Name: "x", SpiffeId: "spiffe://example.org/x", Workloads: "unix.uid == 1", DnsNames: strings.Split(strings.Repeat("a.b,", 100_000), ",")},
		"hint":     {Name: "x", SpiffeId: "spiffe://example.org/x", Workloads: "unix.uid == 1", Hint: strings.Repeat("h", 8<<20)},
	} {
		if _, err := ca.Admin.ApplyEntries(t.Context(), &adminv1.ApplyEntriesRequest{Entries: []*entryv1.Entry{e}}); err == nil {
			t.Errorf("%s is applied", name)
		} else if len(err.Error()) > 64<<10 {
			t.Errorf("%s: the error has %d bytes", name, len(err.Error()))
		}
	}

	root := trustOf(t, ca).X509Authorities()[0]
	block := string(pemOf(root))
	agentYAML := filepath.Join(dir, "agent.yaml")
	must(t, os.WriteFile(agentYAML, fmt.Appendf(nil, `trust_domain: example.org
ca: {address: '%s', bundle: %s}
data_dir: %s/agent
socket: %[3]s/a.sock
admin_socket: %[3]s/b.sock
metrics_listen: off
node_attestation: {join_token: {token_file: /x}}
`, ca.Listen, path, dir), 0o600))
	for name, content := range map[string]string{
		"many roots":      strings.Repeat(block, 20_000),
		"no end":          "-----BEGIN CERTIFICATE-----\n" + strings.Repeat("QUFB\n", 200_000),
		"only beginnings": strings.Repeat("-----BEGIN CERTIFICATE-----\n", 35_000),
		"headers":         "-----BEGIN CERTIFICATE-----\n" + strings.Repeat("a: b\n", 200_000) + "\n-----END CERTIFICATE-----\n",
		"nested ASN.1":    "-----BEGIN CERTIFICATE-----\n" + base64.StdEncoding.EncodeToString(nestedASN1(100_000)) + "\n-----END CERTIFICATE-----\n",
		"a key":           "-----BEGIN PRIVATE KEY-----\nQUFB\n-----END PRIVATE KEY-----\n",
		"zeros":           string(make([]byte, 2<<20)),
	} {
		must(t, os.WriteFile(path, []byte(content), 0o600))
		if out, err := frugal(t, filepath.Join(local.Binaries(t), "node-agent"), "check", "--config", agentYAML); err == nil {
			t.Errorf("bundle %s is good: %.200s", name, out)
		}
	}
	for name, content := range map[string]string{
		"aliases": laughs, "deep": strings.Repeat("[", 100_000), "large": strings.Repeat("#\n", 5<<20), "endless": "/dev/zero",
	} {
		file := path
		if must(t, os.WriteFile(path, []byte(content), 0o600)); name == "endless" {
			file = content
		}
		for _, program := range []string{"ca", "node-agent"} {
			if out, err := frugal(t, filepath.Join(local.Binaries(t), program), "check", "--config", file); err == nil {
				t.Errorf("%s: configuration %s is good: %.200s", program, name, out)
			}
		}
	}
	if rss := statusOf(t, ca.PID(), "VmHWM"); rss > 256<<20 {
		t.Errorf("the CA took %d MB", rss>>20)
	}
	ca.Apply(t, entries)
}

// nestedASN1 returns sequences in each other.
func nestedASN1(depth int) []byte {
	var b []byte // from the inside out, and turned round at the end
	for range depth {
		n := len(b)
		switch {
		case n < 128:
			b = append(b, byte(n), 0x30)
		case n < 1<<16:
			b = append(b, byte(n), byte(n>>8), 0x82, 0x30)
		default:
			b = append(b, byte(n), byte(n>>8), byte(n>>16), 0x83, 0x30)
		}
	}
	for i, j := 0, len(b)-1; i < j; i, j = i+1, j-1 {
		b[i], b[j] = b[j], b[i]
	}
	return b
}

// Thousands of different names, entries, nodes, processes and error texts do not
// make one more series of metrics.
func TestV_I5_SeriesAreFixed(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	fetch(t, w.agent)
	atCA, atAgent := metrics(t, w.ca.Metrics), metrics(t, w.agent.Metrics)

	var many []*entryv1.Entry
	for n := range 1000 {
		many = append(many, &entryv1.Entry{
			Name: fmt.Sprintf("entry-%d", n), SpiffeId: fmt.Sprintf("spiffe://example.org/e/%d", n),
			Workloads: fmt.Sprintf("unix.uid == %d", 30_000+n),
		})
	}
	_, err := w.ca.Admin.ApplyEntries(t.Context(), &adminv1.ApplyEntriesRequest{Entries: many})
	must(t, err)
	for n := range 20 {
		r := join(t, w.ca, "node-"+strconv.Itoa(n))
		conn := r.dial(t, w.ca, tlsTo(r.roots, r))
		for k := range 20 {
			_, err := issue(t, conn, fmt.Sprintf("no-such-%d-%d", n, k), uint32(n*100+k))
			must(t, err)
		}
		_, err := issue(t, conn, fmt.Sprintf("entry-%d", n), uint32(30_000+n))
		must(t, err)
		must(t, conn.Close())
	}
	conn, err := grpc.NewClient("unix:"+w.agent.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	defer conn.Close()
	client := secretv3.NewSecretDiscoveryServiceClient(conn)
	for n := range 40 {
		stream, err := client.StreamSecrets(t.Context())
		must(t, err)
		names := []string{"default"}
		for k := range 200 {
			names = append(names, fmt.Sprintf("name-%d-%d", n, k))
		}
		node := &corev3.Node{Id: fmt.Sprintf("node-%d", n)}
		must(t, stream.Send(&discoveryv3.DiscoveryRequest{Node: node, ResourceNames: names}))
		r, err := stream.Recv()
		must(t, err)
		must(t, stream.Send(&discoveryv3.DiscoveryRequest{
			ResourceNames: names, ResponseNonce: r.GetNonce(), ErrorDetail: &statuspb.Status{Message: fmt.Sprintf("error %d %x", n, n*n)},
		}))
		must(t, stream.CloseSend())
		for err == nil {
			_, err = stream.Recv()
		}
		for k := range 20 {
			method := fmt.Sprintf("/service.%d/Method%d", n, k)
			if err := conn.Invoke(t.Context(), method, &discoveryv3.DiscoveryRequest{}, &discoveryv3.DiscoveryResponse{}); err == nil {
				t.Errorf("%s exists", method)
			}
		}
	}
	for n := range 3 {
		output(t, as(t, alice, "fetch", w.agent.Socket))
		_ = as(t, 25_000+uint32(n), "fetch", w.agent.Socket).Run() // it has no entry
	}
	for name, tt := range map[string]struct {
		before map[string]float64
		now    map[string]float64
	}{"the CA": {atCA, metrics(t, w.ca.Metrics)}, "the agent": {atAgent, metrics(t, w.agent.Metrics)}} {
		for series := range tt.now {
			if _, ok := tt.before[series]; !ok {
				t.Errorf("%s: series %s is new", name, series)
			}
			for _, canary := range []string{"entry-", "node-", "spiffe://", "no-such", "name-", "service."} {
				if strings.Contains(series, canary) {
					t.Errorf("%s: series %s holds a name", name, series)
				}
			}
		}
		t.Logf("%s: %d series", name, len(tt.now))
	}
}

// Join tokens and private keys are nowhere but where they belong: not in logs at
// their most talkative, not in metrics, in no database, ledger or cache.
func TestV_J4_Canaries(t *testing.T) {
	t.Parallel()
	require.Root(t)
	ca := local.StartCA(t, local.CAOptions{Wrap: wrap("true", "--log-level debug")})
	ca.Apply(t, entries)
	agent := ca.StartAgent(t, "web-1", local.AgentOptions{Wrap: wrap("true", "--log-level debug")})
	canaries := map[string][]byte{}
	plant := func(name string, secret []byte) {
		canaries[name] = secret
		canaries[name+" in hex"] = []byte(hex.EncodeToString(secret))
		// base64 at each of three offsets, without what depends on the neighbours
		for n := range 3 {
			text := base64.StdEncoding.EncodeToString(append(make([]byte, n), secret...))
			canaries[fmt.Sprintf("%s in base64 %d", name, n)] = []byte(text[4 : len(text)-4])
			canaries[fmt.Sprintf("%s in URL base64 %d", name, n)] = []byte(strings.NewReplacer("+", "-", "/", "_").Replace(text[4 : len(text)-4]))
		}
	}
	token, err := os.ReadFile(filepath.Join(agent.Dir, "token"))
	must(t, err)
	raw, err := base64.RawURLEncoding.DecodeString(string(token)[strings.LastIndex(string(token), "_jt_")+4:])
	must(t, err)
	plant("the join token", raw)
	canaries["the join token's text"] = token
	made, err := ca.Admin.CreateToken(t.Context(), &adminv1.CreateTokenRequest{NodeName: "unused"})
	must(t, err)
	canaries["a join token's text"] = []byte(made.GetToken())

	fetch(t, agent)
	svid, err := workloadapi.FetchX509SVID(t.Context(), workloadapi.WithAddr(agent.Address()))
	must(t, err)
	plant("a workload's key", scalar(t, svid.PrivateKey))
	keyFiles := files(t, nil, filepath.Join(ca.DataDir, "keys"))
	for _, path := range keyFiles {
		st, err := os.Stat(path)
		if err != nil || !st.Mode().IsRegular() || st.Size() == 0 {
			continue
		}
		data, err := os.ReadFile(path)
		must(t, err)
		if filepath.Base(path) == "log.key" { // a signed-note key, one line of text
			canaries["the log's key"] = bytes.TrimSpace(data)
			continue
		}
		plant("the root's key", rootScalar(t, data))
	}
	if canaries["the root's key"] == nil {
		t.Fatalf("no root key in %v", keyFiles)
	}

	// Mistakes that print what they were given.
	_, _ = ca.Command(t, "token", "delete", string(token)) // it is refused
	again := ca.LaunchAgent(t, "web-2", local.AgentOptions{Wrap: wrap("true", "--log-level debug")})
	must(t, os.WriteFile(filepath.Join(again.Dir, "token"), token, 0o600)) // used before, or just in time
	again.Kill()
	again.Start(t)
	agent.Kill()
	agent.Start(t)
	agent.AwaitConnected(t)
	must(t, agent.Stop(t))
	agent.Start(t)
	agent.AwaitConnected(t)
	fetch(t, agent)
	again.Kill()

	places := map[string][]byte{"the CA's log": []byte(ca.Log()), "the agent's log": []byte(agent.Log()), "the other agent's log": []byte(again.Log())}
	for name, address := range map[string]string{"the CA's metrics": ca.Metrics, "the agent's metrics": agent.Metrics} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+address+"/metrics", http.NoBody)
		must(t, err)
		answer, err := http.DefaultClient.Do(req)
		must(t, err)
		places[name], err = io.ReadAll(answer.Body)
		must(t, err)
		answer.Body.Close()
	}
	for _, args := range [][]string{
		{"ledger", "tail", "--dir", filepath.Join(ca.DataDir, "ledger"), "-n", "1000", "-o", "json"},
		{"token", "list", "-o", "json"},
		{"node", "list", "-o", "json"},
		{"status"},
		{"authority", "list", "-o", "json"},
	} {
		places["ca "+args[0]] = []byte(ca.MustCommand(t, args...))
	}
	status, err := exec.CommandContext(t.Context(), filepath.Join(local.Binaries(t), "node-agent"),
		"status", "-o", "json", "--admin-socket", agent.AdminSocket).Output()
	must(t, err)
	places["node-agent status"] = status
	for _, path := range files(t, keyFiles, ca.DataDir, filepath.Join(agent.Dir, "agent"), filepath.Join(again.Dir, "agent")) {
		if st, err := os.Lstat(path); err == nil && st.Mode().IsRegular() {
			places[path], err = os.ReadFile(path)
			must(t, err)
		}
	}
	for _, p := range []*local.Process{ca.Process, agent.Process} {
		for _, name := range []string{"environ", "cmdline", "comm"} {
			path := fmt.Sprintf("/proc/%d/%s", p.PID(), name)
			places[path], err = os.ReadFile(path)
			must(t, err)
		}
	}
	for place, content := range places {
		for name, secret := range canaries {
			if bytes.Contains(content, secret) {
				t.Errorf("%s is in %s", name, place)
			}
		}
		if bytes.Contains(content, []byte("PRIVATE KEY")) {
			t.Errorf("a private key is in %s", place)
		}
	}
	if len(places["the CA's log"]) < 200 || len(places["ca ledger"]) < 1000 {
		t.Errorf("too little was looked at: %d, %d", len(places["the CA's log"]), len(places["ca ledger"]))
	}
}

// scalar returns the secret number of an ECDSA key.
func scalar(t *testing.T, key any) []byte {
	t.Helper()
	k, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		t.Fatalf("key is %T", key)
	}
	b, err := k.Bytes()
	must(t, err)
	return b
}

// rootScalar is scalar for a key in PEM.
func rootScalar(t *testing.T, data []byte) []byte {
	t.Helper()
	block, _ := pem.Decode(data)
	if block == nil {
		t.Fatal("no PEM in the root's key")
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	must(t, err)
	return scalar(t, key)
}
