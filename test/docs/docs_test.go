// Package docs holds the documents to the programs: generated pages are compared
// with what generates them, and the examples in the pages are executed.
package docs

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/meshid/meshid/test/local"
)

var update = flag.Bool("update", false, "write the generated pages")

// bin is the folder of the programs that the tests run.
var bin string

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(run(m)) //nolint:forbidigo // as every TestMain
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "docs")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	build := exec.Command("go", "build", "-o", dir+"/", "./cmd/...")
	build.Dir = "../.."
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build the programs: %v\n%s", err, out)
		return 1
	}
	bin = dir
	return m.Run()
}

// generated compares a page with what it should be, or writes it.
func generated(t *testing.T, page, want string) {
	t.Helper()
	path := filepath.Join("../../docs", page)
	if *update {
		if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("docs/%s is not what it should be; run make generate\n%s", page, diff)
	}
}

func TestConfiguration(t *testing.T) {
	var page strings.Builder
	page.WriteString(`# Configuration

<!-- Generated from cmd/ca/config.go and cmd/node-agent/config.go by make generate. -->

One strict YAML file a program. An unknown key, a key given twice or a value of the wrong type is an error with line
and column; anchors, aliases and tags are not supported. Durations are written as 30s, 15m or 1h. Secrets are never
in these files, only the paths of theirs. ` + "`ca check` and `node-agent check`" + ` check a file without starting.
`)
	for _, p := range []struct{ title, file, path string }{
		{"The CA", "cmd/ca/config.go", "/etc/meshid/ca.yaml"},
		{"The node agent", "cmd/node-agent/config.go", "/etc/meshid/agent.yaml"},
	} {
		fmt.Fprintf(&page, "\n## %s: %s\n\n| key | default | meaning |\n|---|---|---|\n", p.title, p.path)
		file, err := parser.ParseFile(token.NewFileSet(), filepath.Join("../..", p.file), nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		types := structs(file)
		writeKeys(t, &page, types, types["settings"], "")
	}
	page.WriteString(examples)
	generated(t, "configuration.md", page.String())
}

const examples = "\n## Examples\n\n" +
	"A CA that also admits machines with a certificate of the company's own CA:\n\n" +
	"```yaml file=ca.yaml\n" + `trust_domain: example.org
data_dir: /var/lib/meshid/ca
listen: :8443
svid:
  default_ttl: 1h
  max_ttl: 12h
node_attestation:
  join_token: {}
` + "```\n\n```console\n$ ca check --config ca.yaml\n" +
	"the configuration is valid: trust domain example.org, data in /var/lib/meshid/ca, listening at :8443\n```\n\n" +
	"Every mistake says where it is and what to write:\n\n```yaml file=typo.yaml\ntrust_domain: example.org\nsvid:\n  default_tll: 1h\n```\n\n" +
	"```console\n$ ca check --config typo.yaml\nerror: typo.yaml:3:3: unknown key \"default_tll\"; did you mean \"default_ttl\"?\n```\n"

// structs are the struct types that a file declares, by name.
func structs(file *ast.File) map[string]*ast.StructType {
	types := make(map[string]*ast.StructType)
	ast.Inspect(file, func(n ast.Node) bool {
		if s, ok := n.(*ast.TypeSpec); ok {
			if st, ok := s.Type.(*ast.StructType); ok {
				types[s.Name.Name] = st
			}
		}
		return true
	})
	return types
}

// packageStructs are those of a folder.
func packageStructs(t *testing.T, dir string) map[string]*ast.StructType {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("../..", dir, "*.go"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no Go files in %s: %v", dir, err)
	}
	types := make(map[string]*ast.StructType)
	for _, path := range files {
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasSuffix(path, "_test.go") {
			maps.Copy(types, structs(file))
		}
	}
	return types
}

// writeKeys writes a row for each key of s and of what is in it. The settings of a
// plug-in are those of the type Config in the folder that the tag names.
func writeKeys(t *testing.T, page *strings.Builder, types map[string]*ast.StructType, s *ast.StructType, prefix string) {
	t.Helper()
	for i, f := range s.Fields.List {
		tag := reflect.StructTag("")
		if f.Tag != nil {
			tag = reflect.StructTag(strings.Trim(f.Tag.Value, "`"))
		}
		key := prefix + tag.Get("yaml")
		def := tag.Get("default")
		if strings.ContainsAny(def, "0123456789/") {
			def = "`" + def + "`"
		}
		doc := f.Doc
		if doc == nil && i > 0 {
			doc = s.Fields.List[i-1].Doc // of two that belong together
		}
		fmt.Fprintf(page, "| `%s` | %s | %s |\n", key, def, meaning(doc.Text(), tag.Get("yaml"), f.Names))
		if dir := tag.Get("settings"); dir != "" {
			settings := packageStructs(t, dir)
			writeKeys(t, page, settings, settings["Config"], key+".")
		}
		switch ft := f.Type.(type) {
		case *ast.StructType:
			writeKeys(t, page, types, ft, key+".")
		case *ast.StarExpr: // a section that need not be there
			if nested, ok := ft.X.(*ast.Ident); ok && types[nested.Name] != nil {
				writeKeys(t, page, types, types[nested.Name], key+".")
			}
		case *ast.Ident:
			if nested := types[ft.Name]; nested != nil {
				writeKeys(t, page, types, nested, key+".")
			}
		case *ast.ArrayType:
			if element, ok := ft.Elt.(*ast.Ident); ok && types[element.Name] != nil {
				writeKeys(t, page, types, types[element.Name], key+"[].")
			}
		case *ast.SelectorExpr: // a type that plug-ins share
			if ft.Sel.Name == "TLS" {
				shared := packageStructs(t, "pkg/ledger/export")
				writeKeys(t, page, shared, shared["TLS"], key+".")
			}
		}
	}
}

// meaning is the comment of a field for those who know its key: the comments of
// plug-ins' settings begin with the field's name in Go.
func meaning(comment, key string, names []*ast.Ident) string {
	text := strings.Join(strings.Fields(comment), " ")
	for _, n := range names {
		rest, ok := strings.CutPrefix(text, n.Name+" ")
		if !ok {
			continue
		}
		verb, what, _ := strings.Cut(rest, " ")
		switch verb {
		case "is", "are":
			if first, _, _ := strings.Cut(what, " "); strings.Contains(first, ".") {
				return what // a value
			}
			return strings.ToUpper(what[:1]) + what[1:]
		case "says", "names", "logs":
			return "`" + key + "` " + rest
		}
	}
	return text
}

// TestMetrics compares docs/metrics.md with what both programs expose.
func TestMetrics(t *testing.T) {
	if testing.Short() {
		t.Skip("starts both programs")
	}
	dir := t.TempDir()
	caMetrics, agentMetrics, listen := local.FreeAddress(t), local.FreeAddress(t), local.FreeAddress(t)
	config := filepath.Join(dir, "ca.yaml")
	if err := os.WriteFile(config, []byte(fmt.Sprintf(`trust_domain: example.org
console: {listen: '127.0.0.1:0', one_time_link: true}
istio: {listen: '127.0.0.1:0', dns_names: [ca.example.org], issuers: [{name: idp, issuer: 'https://idp.example.org'}]}
kubernetes: {clusters: [{name: docs, kubeconfig: '%s/kubeconfig', pod_certificates: {signer: meshid.io/svid}}]}
`, dir)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "kubeconfig"), []byte(`apiVersion: v1
kind: Config
clusters: [{name: docs, cluster: {server: 'http://`+local.FreeAddress(t)+`'}}]
contexts: [{name: docs, context: {cluster: docs}}]
current-context: docs
`), 0o600); err != nil {
		t.Fatal(err)
	}
	start(t, "ca", "run", "--config", config, "--data-dir", dir+"/ca", "--listen", listen,
		"--admin-socket", dir+"/admin.sock", "--metrics-listen", caMetrics)
	ca := scrape(t, caMetrics)
	ctl := func(args ...string) []byte {
		t.Helper()
		out, err := exec.Command(bin+"/ca", append(args, "--admin-socket", dir+"/admin.sock")...).Output()
		if err != nil {
			t.Fatalf("ca %v: %v", args, err)
		}
		return out
	}
	files := map[string][]byte{
		"bundle.pem": ctl("bundle", "show"),
		"token":      ctl("token", "create", "--node", "docs"),
		"agent.yaml": []byte(fmt.Sprintf(`trust_domain: example.org
ca: {address: '%s', bundle: %[2]s/bundle.pem}
data_dir: %[2]s/agent
socket: %[2]s/workload/agent.sock
admin_socket: %[2]s/agent-admin.sock
metrics_listen: '%[3]s'
node_attestation: {join_token: {token_file: %[2]s/token}}
workload_attestation: {docker: {socket: %[2]s/no-docker.sock}, k8s: {runtime_socket: %[2]s/no-cri.sock}}
csi: {node_name: docs, kubelet_dir: %[2]s/kubelet}
`, listen, dir, agentMetrics)),
	}
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	start(t, "node-agent", "run", "--config", dir+"/agent.yaml")
	agent := scrape(t, agentMetrics)

	var page strings.Builder
	page.WriteString(`# Metrics

<!-- Generated from what the programs expose by make generate. -->

Both programs serve ` + "`/metrics`, `/livez` and `/readyz`" + ` on ` + "`metrics_listen`" + `. Labels are closed sets: no metric ever has
a SPIFFE ID, an entry or a node in a label. Each series exists from the start.
`)
	for _, p := range []struct {
		title    string
		families map[string]*dto.MetricFamily
	}{{"The CA", ca}, {"The node agent", agent}} {
		fmt.Fprintf(&page, "\n## %s\n\n| metric | type | labels | meaning |\n|---|---|---|---|\n", p.title)
		var names []string
		for name := range p.families {
			if strings.HasPrefix(name, "meshid_") {
				names = append(names, name)
			}
		}
		slices.Sort(names)
		for _, name := range names {
			f := p.families[name]
			fmt.Fprintf(&page, "| `%s` | %s | %s | %s |\n", name, strings.ToLower(f.GetType().String()), labels(f), f.GetHelp())
		}
	}
	page.WriteString("\nBeside these, the Go collector's `go_*` and `process_*`.\n")
	generated(t, "metrics.md", page.String())
}

func labels(f *dto.MetricFamily) string {
	var names []string
	for _, m := range f.GetMetric() {
		for _, l := range m.GetLabel() {
			if name := "`" + l.GetName() + "`"; !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	return strings.Join(names, ", ")
}

// start runs a program until the test ends, and fails the test if the program
// does not end cleanly then.
func start(t *testing.T, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(filepath.Join(bin, name), args...)
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Error(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("%s: %v\n%s", name, err, log.String())
		}
	})
}

// scrape reads the metrics at an address once they are there.
func scrape(t *testing.T, address string) map[string]*dto.MetricFamily {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	retry := time.NewTicker(20 * time.Millisecond)
	defer retry.Stop()
	for {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/metrics", nil)
		if err != nil {
			t.Fatal(err)
		}
		answer, err := http.DefaultClient.Do(request)
		if err == nil {
			defer answer.Body.Close()
			p := expfmt.NewTextParser(model.UTF8Validation)
			families, err := p.TextToMetricFamilies(answer.Body)
			if err != nil {
				t.Fatal(err)
			}
			return families
		}
		select {
		case <-ctx.Done():
			t.Fatalf("no metrics at %s: %v", address, err)
		case <-retry.C:
		}
	}
}

var fence = regexp.MustCompile("(?ms)^```(\\w+)([^\\n]*)\\n(.*?)^```$")

// TestExamples writes the blocks of each page that are marked as files, and
// executes its console blocks, in a folder of the page's own.
func TestExamples(t *testing.T) {
	pages, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	below, err := filepath.Glob("../../docs/*/*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, page := range slices.Concat(pages, below, []string{"../../README.md"}) {
		t.Run(strings.TrimPrefix(page, "../../"), func(t *testing.T) {
			text, err := os.ReadFile(page)
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			for _, m := range fence.FindAllStringSubmatch(string(text), -1) {
				language, options, body := m[1], strings.TrimSpace(m[2]), m[3]
				if name, ok := strings.CutPrefix(options, "file="); ok {
					if err := os.WriteFile(filepath.Join(dir, name), []byte(body), 0o600); err != nil {
						t.Fatal(err)
					}
				}
				if language == "console" {
					console(t, dir, body)
				}
			}
		})
	}
}

// console executes the lines that start with "$ " and compares what they print
// with the lines that follow.
func console(t *testing.T, dir, body string) {
	t.Helper()
	for block := range strings.SplitSeq(strings.TrimPrefix(body, "$ "), "\n$ ") {
		command, want, _ := strings.Cut(block, "\n")
		cmd := exec.Command("bash", "-c", command)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"))
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		if diff := cmp.Diff(strings.TrimSpace(want), strings.TrimSpace(string(out))); diff != "" {
			t.Errorf("$ %s\n%s", command, diff)
		}
	}
}
