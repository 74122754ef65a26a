package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"

	"github.com/meshid/meshid/internal/cli"
	"github.com/meshid/meshid/internal/durable"
	"github.com/meshid/meshid/pkg/ca"
	"github.com/meshid/meshid/pkg/config"
	"github.com/meshid/meshid/pkg/console"
	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/ledger/tree"
	"github.com/meshid/meshid/pkg/server"
	adminv1 "github.com/meshid/meshid/proto/admin/v1"
)

// consoleAccess is what can be said of the console's settings without starting it.
type consoleAccess struct {
	url    *url.URL
	names  []string
	access console.Access
	keys   *keyFiles // nil for the CA's own X.509-SVID
}

// check checks the settings; on is false if there is no console. bad reports a
// problem with a setting.
func (s *consoleSettings) check(bad func(path, format string, args ...any)) (a *consoleAccess, on bool) {
	if s.Listen == "" || s.Listen == "off" {
		return nil, false
	}
	a = &consoleAccess{names: s.Names}
	host, port, err := net.SplitHostPort(s.Listen)
	if err != nil {
		bad("console.listen", "%q is not an address; write host:port, such as 127.0.0.1:8444, or off", s.Listen)
		return a, true
	}
	ip := net.ParseIP(host)
	loopback := host == "localhost" || ip != nil && ip.IsLoopback()
	switch {
	case s.URL != "":
		if a.url, err = url.Parse(s.URL); err != nil || a.url.Scheme != "https" || a.url.Hostname() == "" || a.url.User != nil ||
			strings.Trim(a.url.Path, "/") != "" || a.url.RawQuery != "" || a.url.Fragment != "" {
			bad("console.url", "%q is not the address of a site; write https://host or https://host:port", s.URL)
			return a, true
		}
	case host == "" || ip != nil && ip.IsUnspecified():
		bad("console.url", "missing: browsers do not reach %q by that name; write the address that they use, such as https://console.example.org:%s", s.Listen, port)
		return a, true
	default:
		a.url = &url.URL{Scheme: "https", Host: s.Listen}
	}
	a.url.Path = ""
	a.names = append(slices.Clone(s.Names), a.url.Hostname())
	if loopback {
		a.names = append(a.names, "localhost", "127.0.0.1", "::1")
	}
	for i, n := range s.Names {
		if n == "" || strings.ContainsAny(n, "/*: ") {
			bad(fmt.Sprintf("console.names[%d]", i), "%q is not a host's name", n)
		}
	}
	life := s.SessionLife.Or(8 * time.Hour)
	if life < time.Minute || life > 7*24*time.Hour {
		bad("console.session_life", "%v is out of range; write a duration from 1m to 168h", life)
	}
	s.SessionLife = config.Duration(life)
	a.access = console.Access{Links: s.OneTimeLink, SessionLife: life, Subjects: s.MTLS.Subjects}
	switch {
	case (s.Certificate == "") != (s.Key == ""):
		bad("console.certificate", "certificate and key belong together: write both, or none")
	case s.Certificate != "":
		a.keys = &keyFiles{certificate: s.Certificate, key: s.Key}
		if _, err := a.keys.get(); err != nil {
			bad("console.certificate", "%v", err)
		}
	}
	s.checkMTLS(a, bad)
	s.checkOIDC(a, bad)
	if !a.access.Links && !s.MTLS.Admins && a.access.ClientCAs == nil && a.access.OIDC == nil {
		bad("console", "nobody could sign in; write one of one_time_link: true, mtls: {admins: true}, mtls.client_ca, or oidc")
	}
	return a, true
}

func (s *consoleSettings) checkMTLS(a *consoleAccess, bad func(path, format string, args ...any)) {
	switch {
	case s.MTLS.ClientCA == "" && len(s.MTLS.Subjects) > 0:
		bad("console.mtls.client_ca", "missing: subjects are those of certificates of a CA")
	case s.MTLS.ClientCA != "" && len(s.MTLS.Subjects) == 0:
		bad("console.mtls.subjects", "missing: write whose certificates may look")
	case s.MTLS.ClientCA != "":
		pool, err := readPool(s.MTLS.ClientCA)
		if err != nil {
			bad("console.mtls.client_ca", "%v", err)
			return
		}
		a.access.ClientCAs = pool
	}
}

func (s *consoleSettings) checkOIDC(a *consoleAccess, bad func(path, format string, args ...any)) {
	o := s.OIDC
	if o.Issuer == "" {
		if o.ClientID != "" || len(o.Subjects)+len(o.Groups) > 0 {
			bad("console.oidc.issuer", "missing; write the provider's address")
		}
		return
	}
	if u, err := url.Parse(o.Issuer); err != nil || u.Scheme != "https" || u.Hostname() == "" {
		bad("console.oidc.issuer", "%q is not the address of a provider; write https://…", o.Issuer)
	}
	if o.ClientID == "" {
		bad("console.oidc.client_id", "missing; write the console's name at the provider")
	}
	if len(o.Subjects) == 0 && len(o.Groups) == 0 {
		bad("console.oidc.subjects", "missing: without subjects or groups, nobody may look")
	}
	c := &console.OIDC{
		Issuer: o.Issuer, ClientID: o.ClientID, RedirectURL: a.url.String() + "/console/login/callback", Scopes: o.Scopes,
		GroupsClaim: o.GroupsClaim, Subjects: o.Subjects, Groups: o.Groups,
	}
	if c.GroupsClaim == "" {
		c.GroupsClaim = "groups"
	}
	if o.ClientSecretFile != "" {
		secret, err := durable.ReadSecret(o.ClientSecretFile, 4096)
		if err != nil {
			bad("console.oidc.client_secret_file", "%v", err)
		}
		c.ClientSecret = strings.TrimSpace(string(secret))
	}
	if o.CA != "" {
		pool, err := readPool(o.CA)
		if err != nil {
			bad("console.oidc.ca", "%v", err)
		}
		c.Roots = pool
	}
	a.access.OIDC = c
}

func readPool(path string) (*x509.CertPool, error) {
	b, err := readInput(path)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("%s holds no certificate in PEM", path)
	}
	return pool, nil
}

// keyFiles are a certificate and its key, which somebody else renews.
type keyFiles struct {
	certificate, key string

	mu       sync.Mutex // guards what follows
	current  *tls.Certificate
	modified [2]time.Time
}

// get returns what is in the files now; while they cannot be read, what was in them.
func (k *keyFiles) get() (*tls.Certificate, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var modified [2]time.Time
	for i, path := range []string{k.certificate, k.key} {
		st, err := os.Stat(path)
		if err != nil {
			return k.orOld(err)
		}
		modified[i] = st.ModTime()
	}
	if k.current != nil && modified == k.modified {
		return k.current, nil
	}
	certificate, err := readInput(k.certificate)
	if err != nil {
		return k.orOld(err)
	}
	key, err := durable.ReadSecret(k.key, maxInput)
	if err != nil {
		return k.orOld(err)
	}
	pair, err := tls.X509KeyPair(certificate, key)
	if err != nil {
		return k.orOld(fmt.Errorf("%s and %s: %w", k.certificate, k.key, err))
	}
	k.current, k.modified = &pair, modified
	return k.current, nil
}

func (k *keyFiles) orOld(err error) (*tls.Certificate, error) {
	if k.current != nil {
		return k.current, nil
	}
	return nil, err
}

// webConsole is the console and its listener.
type webConsole struct {
	*console.Console
	url      string
	listener net.Listener
	tls      *tls.Config
}

// openConsole makes the console, and opens its listener.
func openConsole(ctx context.Context, v *validated, srv *server.Server, authority *ca.CA, journal *ledger.Journal, proofs *tree.Tree,
	index *searchIndex, registry prometheus.Registerer, logger *slog.Logger,
) (*webConsole, error) {
	a := v.console
	admin := srv.AdminService()
	config := console.Config{
		Names: a.names, Strict: a.keys != nil, Fleet: admin, Rules: admin, Authorities: srv, Ledger: srv, Tree: &provenTree{dir: treeDir(v.DataDir), tree: proofs, journal: journal},
		Access: a.access, Logger: logger, Registerer: registry,
	}
	if v.Console.MTLS.Admins {
		config.Access.Admin = srv.Admin
	}
	if index.records != nil {
		config.Index = index.records
	}
	c, err := console.New(config)
	if err != nil {
		return nil, err
	}
	index.tell = c.Changed
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", v.Console.Listen)
	if err != nil {
		return nil, fmt.Errorf("console.listen: %w", err)
	}
	if a.url.Port() == "0" { // as tests listen
		a.url.Host = l.Addr().String()
	}
	return &webConsole{Console: c, url: a.url.String(), listener: l, tls: a.tlsConfig(authority, config.Access)}, nil
}

// tlsConfig is for browsers. Client certificates are asked for where they can be of
// use, and verified by the console.
func (a *consoleAccess) tlsConfig(authority *ca.CA, access console.Access) *tls.Config {
	base := &tls.Config{
		MinVersion: tls.VersionTLS13, CurvePreferences: []tls.CurveID{tls.X25519MLKEM768, tls.X25519, tls.CurveP256},
		NextProtos: []string{"h2", "http/1.1"}, SessionTicketsDisabled: true,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			if a.keys != nil {
				return a.keys.get()
			}
			return authority.ServerCertificate()
		},
	}
	if access.Admin == nil && access.ClientCAs == nil {
		return base
	}
	base.ClientAuth = tls.RequestClientCert
	base.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		c := base.Clone()
		c.GetConfigForClient = nil
		// The names help the browser to choose.
		c.ClientCAs = x509.NewCertPool()
		if access.ClientCAs != nil {
			c.ClientCAs = access.ClientCAs.Clone()
		}
		if access.Admin != nil {
			roots, _ := authority.Bundle()
			for _, r := range roots {
				c.ClientCAs.AddCert(r)
			}
		}
		return c, nil
	}
	return base
}

// run serves the console until ctx ends. The first link goes to out.
func (w *webConsole) run(ctx context.Context, links bool, out io.Writer, logger *slog.Logger) error {
	logger.InfoContext(ctx, "console is ready", "listen", w.listener.Addr().String(), "url", w.url+"/console/")
	if links {
		address, ends, err := w.link("the start of the CA")
		if err != nil {
			return errors.Join(err, w.listener.Close())
		}
		// Not in the log: whoever reads it first would be let in.
		fmt.Fprintf(out, "console: %s\n  (signs in one browser, once, until %s; `ca console link` makes another)\n", address, ends.UTC().Format("15:04:05 UTC"))
	}
	return w.Serve(ctx, w.listener, w.tls)
}

// provenTree implements console.Tree.
type provenTree struct {
	dir     string
	tree    *tree.Tree
	journal *ledger.Journal
}

// Newest implements console.Tree.
func (p *provenTree) Newest() console.Proof {
	c := p.tree.Checkpoint()
	return console.Proof{Size: c.Size, Root: c.Root, Origin: c.Origin}
}

// Halted implements console.Tree.
func (p *provenTree) Halted() error { return p.tree.Halted() }

// Prove implements console.Tree.
func (p *provenTree) Prove(index uint64, record []byte) (console.Proof, error) {
	c := p.tree.Checkpoint()
	out := console.Proof{Size: c.Size, Root: c.Root, Origin: c.Origin}
	if index >= c.Size {
		return out, nil
	}
	proof, err := tree.Prove(p.dir, c, index)
	if err != nil {
		return out, err
	}
	if string(proof.Record) != string(record) {
		return out, fmt.Errorf("record %d of the journal is not the one in the tree", index)
	}
	out.Covered, out.Hashes = true, len(proof.Hashes)
	return out, nil
}

// link makes a link for who asks; w is nil if there is no console.
func (w *webConsole) link(by string) (address string, ends time.Time, err error) {
	if w == nil {
		return "", time.Time{}, errors.New("this CA has no console: set console.listen in its configuration, see docs/console.md")
	}
	path, ends, err := w.NewLink(by)
	return w.url + path, ends, err
}

func newConsoleCommand() *cobra.Command {
	c := &clientFlags{}
	cmd := &cobra.Command{Use: "console", Short: "Sign in to the web console"}
	c.add(cmd)
	cmd.AddCommand(printing(&cobra.Command{
		Use:   "link",
		Short: "Make a link that signs in one browser, once, within ten minutes",
		Long: `Make a link that signs in one browser, once, within ten minutes.

The CA's configuration has to say so:

  console:
    listen: 127.0.0.1:8444
    one_time_link: true`,
		Example: "  ca console link\n  xdg-open \"$(ca console link -o url)\"",
		Args:    cobra.NoArgs,
	}, func(cmd *cobra.Command, _ []string) (answer *adminv1.CreateLinkResponse, err error) {
		ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
		defer cancel()
		conn, closeConn, err := c.dial(ctx)
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, closeConn()) }()
		return adminv1.NewConsoleServiceClient(conn).CreateLink(ctx, new(adminv1.CreateLinkRequest))
	}, func(cmd *cobra.Command, format string, answer *adminv1.CreateLinkResponse) error {
		fmt.Fprintln(cmd.OutOrStdout(), answer.GetUrl())
		if format == "text" {
			fmt.Fprintf(cmd.ErrOrStderr(), "It signs in one browser, once, %s.\n", cli.Until(time.Now(), answer.GetExpiresAt().AsTime()))
		}
		return nil
	}, "text", "url"))
	return cmd
}
