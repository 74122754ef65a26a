package vault

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"

	"github.com/meshid/meshid/pkg/ca/upstream"
	"github.com/meshid/meshid/pkg/ca/upstream/upstreamtest"
	fake "github.com/meshid/meshid/test/fakes/vault"
	"github.com/meshid/meshid/test/require"
)

// asOperator has the test's program be the command `vault`.
const asOperator = "MESHID_TEST_VAULT_OPERATOR"

func TestMain(m *testing.M) {
	if os.Getenv(asOperator) == "" {
		os.Exit(m.Run()) //nolint:forbidigo // TestMain is this package's main
	}
	operator := &fake.Operator{Dir: ".", Getenv: os.Getenv}
	if err := operator.Run(context.Background(), os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2) //nolint:forbidigo // TestMain is this package's main
	}
}

// place is a server with a mount, and the folder of an operator who has done what
// docs/upstream/vault.md says.
type place struct {
	*fake.Server
	dir  string
	page string
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

var fence = regexp.MustCompile("(?ms)^```(\\w+)([^\\n]*)\\n(.*?)^```$")

// newPlace has done on a new server what the page says.
func newPlace(t *testing.T, b upstreamtest.Behaviour, a *upstreamtest.Authority) *place {
	t.Helper()
	p := &place{Server: fake.New(t, a, b), dir: t.TempDir()}
	p.page = read(t, filepath.Join(require.Repository(), "docs/upstream/vault.md"))
	upstreamtest.Write(t, p.dir+"/server-ca.pem", p.CA)
	certificate, key, ca := p.ClientCertificate("ca-1")
	upstreamtest.Write(t, p.dir+"/client.pem", certificate)
	upstreamtest.Write(t, p.dir+"/client-key.pem", key)
	upstreamtest.Write(t, p.dir+"/machines-ca.pem", ca)
	upstreamtest.Write(t, p.dir+"/jwt", []byte(p.ServiceAccountToken("meshid", "meshid-ca", "vault")+"\n"))
	p.operate(t, "vault secrets enable pki")
	for _, m := range fence.FindAllStringSubmatch(p.page, -1) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(m[2]), "file="); ok && m[1] != "yaml" {
			upstreamtest.Write(t, filepath.Join(p.dir, name), []byte(m[3]))
		}
		if m[1] == "sh" {
			p.operate(t, m[3])
		}
	}
	return p
}

// environment is what the command `vault` has.
func (p *place) environment() map[string]string {
	return map[string]string{"VAULT_ADDR": p.URL, "VAULT_CACERT": p.dir + "/server-ca.pem", "VAULT_TOKEN": p.Root}
}

// operate runs the commands of a script in the folder, and returns what they print:
// one in a line, or in (umask 077; …), with its output to a file, or not.
func (p *place) operate(t *testing.T, script string) string {
	t.Helper()
	var printed strings.Builder
	operator := &fake.Operator{Dir: p.dir, Getenv: func(name string) string { return p.environment()[name] }}
	for line := range strings.Lines(strings.ReplaceAll(script, "\\\n", "")) {
		line = strings.TrimSpace(line)
		if inner, ok := strings.CutPrefix(line, "(umask 077; "); ok {
			line = strings.TrimSuffix(inner, ")")
		}
		command, file, redirected := strings.Cut(line, " >")
		words := strings.Fields(command)
		if len(words) == 0 || words[0] != "vault" {
			t.Fatalf("%q is no command of vault", line)
		}
		var out bytes.Buffer
		if err := operator.Run(minute(t), words[1:], &out); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		if redirected {
			upstreamtest.Write(t, filepath.Join(p.dir, file), out.Bytes())
		} else {
			printed.Write(out.Bytes())
		}
	}
	return printed.String()
}

// config is one of those in the page, for this server.
func (p *place) config(t *testing.T, name string) Config {
	t.Helper()
	text := strings.NewReplacer(
		"https://vault.internal:8200", p.URL, "5b1a0318-679c-9c45-e5c6-d1b9a9035d49", p.operate(t, "vault read -field=role_id auth/approle/role/meshid/role-id"),
		"/var/run/secrets/vault/token", p.dir+"/jwt", "token_file: token", "token_file: "+p.dir+"/token", "secret-id", p.dir+"/secret-id",
		"client.pem", p.dir+"/client.pem", "client-key.pem", p.dir+"/client-key.pem",
	).Replace(require.Example(t, "upstream/vault.md", "yaml file="+name))
	var file struct {
		TrustDomain string `yaml:"trust_domain"`
		Upstream    struct {
			Roots []string `yaml:"roots_sha256"`
			Vault Config   `yaml:"vault"`
		} `yaml:"upstream"`
	}
	if err := yaml.UnmarshalWithOptions([]byte(text), &file, yaml.Strict()); err != nil {
		t.Fatal(err)
	}
	file.Upstream.Vault.ServerCA = p.dir + "/server-ca.pem"
	return file.Upstream.Vault
}

// minute bounds what is waited for.
func minute(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func mint(t *testing.T, ca *CA) error {
	t.Helper()
	_, err := upstreamtest.Mint(minute(t), t, ca)
	return err
}

func good(t *testing.T) *place {
	t.Helper()
	return newPlace(t, upstreamtest.Good, upstreamtest.NewAuthority(t, upstreamtest.Good))
}

// The page's commands run in a shell as they stand there.
func TestPage(t *testing.T) {
	p := good(t)
	again := &place{Server: fake.New(t, upstreamtest.NewAuthority(t, upstreamtest.Good), upstreamtest.Good), dir: p.dir}
	upstreamtest.Write(t, p.dir+"/server-ca.pem", again.CA)
	script := asOperator + "=1\nexport " + asOperator + "\n" + `vault() { "$VAULT_PROGRAM" "$@"; }` + "\nvault secrets enable pki\n"
	for _, m := range fence.FindAllStringSubmatch(p.page, -1) {
		if m[1] == "sh" {
			script += m[3]
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(minute(t), "bash", "-e", "-c", script)
	cmd.Dir, cmd.Env = p.dir, append(os.Environ(), "VAULT_PROGRAM="+self)
	for name, value := range again.environment() {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	again.page = p.page
	if err := mint(t, upstreamtest.Open(t, New, again.config(t, "approle.yaml"))); err != nil {
		t.Error(err)
	}
}

// kind is this one, behind p and with c, when the operator has allowed what policy says.
func (p *place) kind(c Config, policy string) upstreamtest.Kind {
	return upstreamtest.Kind{Start: func(t *testing.T, b upstreamtest.Behaviour, a *upstreamtest.Authority) upstream.CA {
		t.Helper()
		p.Become(a, upstreamtest.Good)
		p.operate(t, "vault policy write meshid "+policy)
		switch b { //nolint:exhaustive // the others are answers
		case upstreamtest.Denied:
			upstreamtest.Write(t, p.dir+"/other.hcl", []byte(`path "pki/cert/*" { capabilities = ["read"] }`))
			p.operate(t, "vault policy write meshid other.hcl")
		case upstreamtest.Gone:
			gone := good(t)
			gone.Close()
			c := c
			c.URL, c.ServerCA = gone.URL, gone.dir+"/server-ca.pem"
			return upstreamtest.Open(t, New, c)
		}
		p.Become(a, b)
		return upstreamtest.Open(t, New, c)
	}}
}

// TestConformance is with each method, set up as the page says.
func TestConformance(t *testing.T) {
	for _, name := range []string{"ca.yaml", "approle.yaml", "kubernetes.yaml", "certificate.yaml"} {
		t.Run(name, func(t *testing.T) {
			p := good(t)
			upstreamtest.Run(t, p.kind(p.config(t, name), "meshid.hcl"))
		})
	}
}

// TestLeaves is with the role that the page makes.
func TestLeaves(t *testing.T) {
	p := good(t)
	c := p.config(t, "approle.yaml")
	c.Role = "meshid"
	upstreamtest.RunLeaves(t, p.kind(c, "leaves.hcl"))
	c.Role = ""
	if _, err := upstreamtest.SignLeaf(minute(t), t, upstreamtest.Open(t, New, c)); !errors.Is(err, upstream.ErrDenied) || !strings.Contains(err.Error(), "role: is not set") {
		t.Errorf("without a role: %v", err)
	}
	if err := mint(t, upstreamtest.Open(t, New, c)); !errors.Is(err, upstream.ErrDenied) {
		t.Errorf("an intermediate with the right for leaves: %v", err)
	}
}

// Leaves share a connection, which is replaced when the server has closed it, and when
// the CA that issues the server's certificate is another one.
func TestLeaves_Connections(t *testing.T) {
	p := good(t)
	c := p.config(t, "approle.yaml")
	c.Role = "meshid"
	p.operate(t, "vault policy write meshid leaves.hcl")
	ca := upstreamtest.Open(t, New, c)
	sign := func() error {
		_, err := upstreamtest.SignLeaf(minute(t), t, ca)
		return err
	}
	before := p.Connections()
	for range 20 {
		if err := sign(); err != nil {
			t.Fatal(err)
		}
	}
	if n := p.Connections() - before; n != 2 {
		t.Errorf("%d connections for a login and 20 leaves, want one each for the login and for all leaves", n)
	}
	p.CloseConnections()
	if err := sign(); err != nil {
		t.Errorf("after the server has closed the connections: %v", err)
	}
	other := good(t)
	upstreamtest.Write(t, c.ServerCA, other.CA)
	if err := sign(); !errors.Is(err, upstream.ErrUnavailable) || !strings.Contains(err.Error(), "unknown authority") {
		t.Errorf("with another CA in server_ca: %v", err)
	}
}

// A token that was revoked is replaced, and no login is wasted on one that is valid.
func TestLoginAgain(t *testing.T) {
	p := good(t)
	ca := upstreamtest.Open(t, New, p.config(t, "approle.yaml"))
	for range 2 {
		if err := mint(t, ca); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(p.Requests("/login")); n != 1 {
		t.Errorf("%d logins for two requests", n)
	}
	p.RevokeAll()
	if err := mint(t, ca); err != nil {
		t.Fatal(err)
	}
	p.Advance(2 * time.Hour) // beyond the token's period
	if err := mint(t, ca); err != nil {
		t.Fatal(err)
	}
	if n := len(p.Requests("/login")); n != 3 {
		t.Errorf("%d logins, want one more for each token that ended", n)
	}
	upstreamtest.Write(t, p.dir+"/none.hcl", []byte(`path "secret/*" { capabilities = ["read"] }`))
	p.operate(t, "vault policy write meshid none.hcl")
	err := mint(t, ca)
	if !errors.Is(err, upstream.ErrDenied) || !strings.Contains(err.Error(), `update on "pki/root/sign-intermediate"`) {
		t.Errorf("without the right: %v", err)
	}
	if n := len(p.Requests("/login")); n != 3 {
		t.Errorf("%d logins: one was used for a right that the token does not have", n)
	}
}

// The file of a token is read again when the token is refused.
func TestTokenFile(t *testing.T) {
	p := good(t)
	ca := upstreamtest.Open(t, New, p.config(t, "ca.yaml"))
	if err := mint(t, ca); err != nil {
		t.Fatal(err)
	}
	p.RevokeAll()
	err := mint(t, ca)
	if !errors.Is(err, upstream.ErrDenied) || !strings.Contains(err.Error(), "the token in "+p.dir+"/token") || strings.Contains(err.Error(), "capability") {
		t.Errorf("a revoked token: %v", err)
	}
	p.operate(t, "vault token create -policy=meshid -period=24h -field=token >token")
	if err := mint(t, ca); err != nil {
		t.Errorf("with a new token in the file: %v", err)
	}
	// Tokens that can be used a number of times: each login uses one.
	p.operate(t, "vault token create -policy=meshid -use-limit=2 -field=token >token")
	ca = upstreamtest.Open(t, New, p.config(t, "ca.yaml"))
	if err := mint(t, ca); err != nil {
		t.Fatal(err)
	}
	if err := mint(t, ca); !errors.Is(err, upstream.ErrDenied) {
		t.Errorf("a token without uses: %v", err)
	}
}

// What the server quotes does not come out.
func TestSecretsStaySecret(t *testing.T) {
	p := good(t)
	p.operate(t, "vault write auth/approle/role/meshid token_policies=meshid token_period=1h secret_id_num_uses=1")
	c := p.config(t, "approle.yaml")
	c.AppRole.RoleID = p.operate(t, "vault read -field=role_id auth/approle/role/meshid/role-id")
	p.operate(t, "vault write -f -field=secret_id auth/approle/role/meshid/secret-id >secret-id")
	ca := upstreamtest.Open(t, New, c)
	if err := mint(t, ca); err != nil {
		t.Fatal(err)
	}
	p.RevokeAll()
	err := mint(t, ca)
	if !errors.Is(err, upstream.ErrDenied) || !strings.Contains(err.Error(), "invalid secret_id") || !strings.Contains(err.Error(), c.AppRole.SecretIDFile) {
		t.Errorf("a secret ID without uses: %v", err)
	}
	if strings.Contains(fmt.Sprint(err), read(t, c.AppRole.SecretIDFile)) {
		t.Errorf("the error has the secret ID: %v", err)
	}
}

func TestWrapped(t *testing.T) {
	p := good(t)
	c := p.config(t, "approle.yaml")
	c.AppRole.Wrapped, c.AppRole.SecretIDFile = true, p.dir+"/wrapped-secret-id"
	ca := upstreamtest.Open(t, New, c)
	if err := mint(t, ca); err != nil {
		t.Fatal(err)
	}
	p.RevokeAll()
	if err := mint(t, ca); err != nil {
		t.Errorf("with the secret ID that was unwrapped: %v", err)
	}
	if n := len(p.Requests("/unwrap")); n != 1 {
		t.Errorf("unwrapped %d times", n)
	}
	err := mint(t, upstreamtest.Open(t, New, c))
	if !errors.Is(err, upstream.ErrDenied) || !strings.Contains(err.Error(), "somebody else has used it") {
		t.Errorf("a wrapping token that was used: %v", err)
	}
	upstreamtest.Write(t, c.AppRole.SecretIDFile, []byte(p.Wrap("auth/approle/role/other/custom-secret-id", map[string]any{"secret_id": "x"})))
	if err := mint(t, upstreamtest.Open(t, New, c)); !errors.Is(err, upstream.ErrDenied) || !strings.Contains(err.Error(), "was made by") {
		t.Errorf("what somebody else has wrapped: %v", err)
	}
	if strings.Contains(fmt.Sprint(err), read(t, c.AppRole.SecretIDFile)) {
		t.Errorf("the error has the wrapping token: %v", err)
	}
	p.operate(t, "vault write -f -wrap-ttl=10m -field=wrapping_token auth/approle/role/meshid/secret-id >wrapped-secret-id")
	if err := mint(t, upstreamtest.Open(t, New, c)); err != nil {
		t.Errorf("with a new one: %v", err)
	}
}

// Every method has its own refusals, which say where to look.
func TestLoginRefused(t *testing.T) {
	for _, c := range []struct {
		config string
		spoil  func(*testing.T, *place)
		says   string
	}{
		{"kubernetes.yaml", func(t *testing.T, p *place) {
			upstreamtest.Write(t, p.dir+"/jwt", []byte(p.ServiceAccountToken("meshid", "default", "vault")))
		}, "service account name not authorized"},
		{"kubernetes.yaml", func(t *testing.T, p *place) {
			upstreamtest.Write(t, p.dir+"/jwt", []byte(p.ServiceAccountToken("meshid", "meshid-ca", "api")))
		}, "audience"},
		{"kubernetes.yaml", func(_ *testing.T, p *place) { p.Advance(time.Hour) }, "expired"},
		{"certificate.yaml", func(t *testing.T, p *place) {
			certificate, key, _ := p.ClientCertificate("ca-1")
			upstreamtest.Write(t, p.dir+"/client.pem", certificate)
			upstreamtest.Write(t, p.dir+"/client-key.pem", key)
		}, "its CA"},
		{"approle.yaml", func(t *testing.T, p *place) { upstreamtest.Write(t, p.dir+"/secret-id", []byte("guess")) }, "role_id and"},
	} {
		p := good(t)
		config := p.config(t, c.config)
		c.spoil(t, p)
		if err := mint(t, upstreamtest.Open(t, New, config)); !errors.Is(err, upstream.ErrDenied) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: got %v, want it to say %q", c.config, err, c.says)
		}
	}
}

// watch runs WatchRoots until the test ends.
func watch(t *testing.T, ca *CA) (roots <-chan []*x509.Certificate, ended <-chan error) {
	t.Helper()
	seen, end := make(chan []*x509.Certificate, 16), make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	t.Cleanup(func() {
		cancel()
		<-done
	})
	go func() {
		defer close(done)
		end <- ca.WatchRoots(ctx, func(all []*x509.Certificate) error {
			seen <- all
			return nil
		})
	}()
	return seen, end
}

func receive[T any](t *testing.T, from <-chan T) T {
	t.Helper()
	select {
	case v := <-from:
		return v
	case <-time.After(time.Minute):
		t.Fatal("nothing comes")
		panic("unreachable")
	}
}

// The token is renewed at half of its life, however long nothing is signed, and a
// change of the root is told.
func TestRenewal(t *testing.T) {
	p := good(t)
	p.operate(t, "vault write auth/kubernetes/role/meshid bound_service_account_names=meshid-ca bound_service_account_namespaces=meshid token_policies=meshid token_period=2s")
	ca := upstreamtest.Open(t, New, p.config(t, "kubernetes.yaml"))
	roots, ended := watch(t, ca)
	receive(t, roots)
	p.Await("/renew-self", 1)
	if n := len(p.Requests("/login")); n != 1 {
		t.Errorf("%d logins", n)
	}
	other := upstreamtest.NewAuthority(t, upstreamtest.Good)
	p.Become(other, upstreamtest.Good)
	p.Await("/renew-self", 2)
	if all := receive(t, roots); len(all) != 1 || !all[0].Equal(other.Root) {
		t.Errorf("told %d roots", len(all))
	}
	p.Seal(true)
	if err := receive(t, ended); !errors.Is(err, upstream.ErrUnavailable) || !strings.Contains(err.Error(), "sealed") {
		t.Errorf("sealed: %v", err)
	}
}

// lookAt makes one look of WatchRoots.
func lookAt(t *testing.T, ca *CA) error {
	t.Helper()
	_, _, err := ca.look(minute(t))
	return err
}

// age has half of the token's life be over, for the client.
func age(t *testing.T, ca *CA) {
	t.Helper()
	if err := ca.session.acquire(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer ca.session.release()
	ca.session.lease.ends = now().Add(ca.session.lease.life * 2 / 5)
}

// A token whose longest life is nearly over is replaced in time, as is one that
// cannot be renewed. One in a file that cannot be replaced is told of.
func TestReplacedInTime(t *testing.T) {
	p := good(t)
	p.operate(t, "vault write auth/cert/certs/meshid certificate=@machines-ca.pem token_policies=meshid token_ttl=1h token_max_ttl=90m")
	ca := upstreamtest.Open(t, New, p.config(t, "certificate.yaml"))
	if err := lookAt(t, ca); err != nil {
		t.Fatal(err)
	}
	for _, want := range []struct{ renewals, logins int }{{1, 1}, {2, 2}, {3, 2}} {
		age(t, ca)
		p.Advance(36 * time.Minute)
		if err := lookAt(t, ca); err != nil {
			t.Fatal(err)
		}
		if r, l := len(p.Requests("/renew-self")), len(p.Requests("/login")); r != want.renewals || l != want.logins {
			t.Errorf("%d renewals and %d logins, want %+v", r, l, want)
		}
	}
	p.operate(t, "vault token create -policy=meshid -ttl=1h -renewable=false -field=token >token")
	ca = upstreamtest.Open(t, New, p.config(t, "ca.yaml"))
	if err := lookAt(t, ca); err != nil {
		t.Fatal(err)
	}
	p.Advance(40 * time.Minute)
	age(t, ca)
	if err := lookAt(t, ca); !errors.Is(err, upstream.ErrDenied) || !strings.Contains(err.Error(), "cannot be renewed: look at the token in") {
		t.Errorf("got %v", err)
	}
	if err := mint(t, ca); err != nil {
		t.Errorf("it still lives: %v", err)
	}
}

func TestLease(t *testing.T) {
	at := time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)
	l := newLease("x", time.Hour, true, at)
	for _, c := range []struct {
		lease  lease
		after  time.Duration
		usable bool
		dueIn  time.Duration
	}{
		{l, 0, true, 30 * time.Minute},
		{l, 30 * time.Minute, true, 0},
		{l, time.Hour - slack, false, 0},
		{newLease("x", 0, true, at), 365 * 24 * time.Hour, true, never},
		{lease{}, 0, false, 0},
	} {
		if usable, due := c.lease.usable(at.Add(c.after)), c.lease.dueIn(at.Add(c.after)); usable != c.usable || due != c.dueIn {
			t.Errorf("after %s: usable %v, due in %s; want %v, %s", c.after, usable, due, c.usable, c.dueIn)
		}
	}
}

// Where the server is not itself, or not the right one.
func TestUnavailable(t *testing.T) {
	p := good(t)
	ca := upstreamtest.Open(t, New, p.config(t, "ca.yaml"))
	p.Seal(true)
	if err := mint(t, ca); !errors.Is(err, upstream.ErrUnavailable) || errors.Is(err, upstream.ErrDenied) || !strings.Contains(err.Error(), "Vault is sealed") {
		t.Errorf("sealed: %v", err)
	}
	p.Seal(false)
	p.Standby("https://127.0.0.1:1")
	if err := mint(t, ca); !errors.Is(err, upstream.ErrUnavailable) || !strings.Contains(err.Error(), "standby") {
		t.Errorf("a standby: %v", err)
	}
	p.Standby("")
	if err := mint(t, ca); err != nil {
		t.Errorf("active again: %v", err)
	}
	c := p.config(t, "certificate.yaml")
	p.Namespace("team-a")
	if err := mint(t, upstreamtest.Open(t, New, c)); !errors.Is(err, upstream.ErrDenied) || !strings.Contains(err.Error(), "no handler for route") {
		t.Errorf("without the namespace: %v", err)
	}
	c.Namespace = "/team-a/"
	if err := mint(t, upstreamtest.Open(t, New, c)); err != nil {
		t.Errorf("in the namespace: %v", err)
	}
	c.Mount = "pki-old"
	if err := mint(t, upstreamtest.Open(t, New, c)); !errors.Is(err, upstream.ErrDenied) || !strings.Contains(err.Error(), "pki-old/root/sign-intermediate") {
		t.Errorf("a mount that is not there: %v", err)
	}
}

func TestIssuer(t *testing.T) {
	p := good(t)
	upstreamtest.Write(t, p.dir+"/issuer.hcl", []byte(`path "pki/issuer/mesh/sign-intermediate" { capabilities = ["update"] }`))
	p.operate(t, "vault write pki/config/issuers default=mesh\nvault policy write meshid issuer.hcl")
	c := p.config(t, "kubernetes.yaml")
	c.Issuer = "mesh"
	ca := upstreamtest.Open(t, New, c)
	if err := mint(t, ca); err != nil {
		t.Fatal(err)
	}
	if err := lookAt(t, ca); err != nil {
		t.Error(err)
	}
	if len(p.Requests("/pki/issuer/mesh/json")) == 0 {
		t.Error("the chain of another issuer was read")
	}
	c.Issuer = "none"
	if err := mint(t, upstreamtest.Open(t, New, c)); !errors.Is(err, upstream.ErrDenied) || !strings.Contains(err.Error(), "pki/issuer/none") {
		t.Errorf("got %v", err)
	}
}

// A mount that was given an intermediate without its root.
func TestRoots(t *testing.T) {
	a := upstreamtest.NewAuthority(t, upstreamtest.NoRoot)
	p := newPlace(t, upstreamtest.NoRoot, a)
	c := p.config(t, "kubernetes.yaml")
	if err := mint(t, upstreamtest.Open(t, New, c)); err == nil {
		t.Error("an answer without a root was accepted")
	}
	if err := lookAt(t, upstreamtest.Open(t, New, c)); err == nil || !strings.Contains(err.Error(), "set roots") {
		t.Errorf("got %v", err)
	}
	c.Roots = upstreamtest.Write(t, p.dir+"/roots.pem", upstreamtest.PEM(a.Root))
	ca := upstreamtest.Open(t, New, c)
	if err := mint(t, ca); err != nil {
		t.Error(err)
	}
	if err := lookAt(t, ca); err != nil {
		t.Error(err)
	}
}

func TestNew(t *testing.T) {
	p := good(t)
	for _, c := range []struct {
		name   string
		change func(*Config)
		says   string
	}{
		{"no url", func(c *Config) { c.URL = "" }, "https://host:port"},
		{"plain HTTP", func(c *Config) { c.URL = "http://vault:8200" }, "https://host:port"},
		{"a path", func(c *Config) { c.URL += "/v1" }, "https://host:port"},
		{"no method", func(c *Config) { c.TokenFile = "" }, "set one of"},
		{"two methods", func(c *Config) { c.Kubernetes.Role = "meshid" }, "set one of"},
		{"a mount that leaves", func(c *Config) { c.Mount = "pki/../sys" }, "mount: "},
		{"an issuer with a path", func(c *Config) { c.Issuer = "a/b" }, "issuer: "},
		{"a missing token", func(c *Config) { c.TokenFile += "x" }, "no such file"},
		{"two lines", func(c *Config) { c.TokenFile = p.dir + "/meshid.hcl" }, "want one line"},
		{"no roots", func(c *Config) { c.Roots = c.TokenFile }, "roots: "},
		{"no server CA", func(c *Config) { c.ServerCA = c.TokenFile }, "server_ca: "},
		{"half an AppRole", func(c *Config) { c.TokenFile, c.AppRole.RoleID = "", "x" }, "secret_id_file"},
		{"half a certificate", func(c *Config) { c.TokenFile, c.Certificate.Certificate = "", "x" }, "certificate and key"},
		{"no Kubernetes role", func(c *Config) { c.TokenFile, c.Kubernetes.TokenFile = "", "x" }, "kubernetes: set role"},
	} {
		t.Run(c.name, func(t *testing.T) {
			config := p.config(t, "ca.yaml")
			c.change(&config)
			if _, err := New(config); err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want it to say %q", err, c.says)
			}
		})
	}
}
