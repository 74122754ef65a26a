package console

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// TestAccess: who has shown nothing sees nothing.
func TestAccess(t *testing.T) {
	c := testConsole(t, &world{text: "secret-name"})
	b := newBrowser(t, c)
	for _, path := range pagePaths {
		resp := b.status(http.StatusSeeOther, http.MethodGet, path, nil)
		if to := resp.Header.Get("Location"); !strings.HasPrefix(to, loginPath+"?to=%2Fconsole%2F") || strings.Contains(resp.Body, "secret-name") {
			t.Errorf("%s: to %s: want the login", path, to)
		}
	}
	b.status(http.StatusUnauthorized, http.MethodGet, "/console/events", nil)
	if page := b.status(http.StatusOK, http.MethodGet, loginPath, nil).Body; strings.Contains(page, "secret-name") {
		t.Error("the login shows more than itself")
	}
	for _, forged := range []string{"", "x", strings.Repeat("A", 26)} {
		b.cookies[sessionCookie] = forged
		b.status(http.StatusSeeOther, http.MethodGet, "/console/", nil)
	}
}

// TestLink: a link signs in once, not after its time, and looking at it uses nothing
// up.
func TestLink(t *testing.T) {
	now := epoch
	c := testConsole(t, &world{text: "x"}, func(c *Config) { c.Now = func() time.Time { return now } })
	secret := token(t, c)
	b := newBrowser(t, c)
	for range 3 { // previews
		if page := b.status(http.StatusOK, http.MethodGet, loginPath+"?token="+secret, nil).Body; !strings.Contains(page, secret) {
			t.Error("the link offers no button")
		}
	}
	resp := b.status(http.StatusSeeOther, http.MethodPost, loginPath+"/link", url.Values{"token": {secret}, "to": {"/console/ledger?event=issue"}})
	if to := resp.Header.Get("Location"); to != "/console/ledger?event=issue" {
		t.Errorf("goes to %q", to)
	}
	b.status(http.StatusOK, http.MethodGet, "/console/", nil)
	newBrowser(t, c).status(http.StatusForbidden, http.MethodPost, loginPath+"/link", url.Values{"token": {secret}})

	late := token(t, c)
	now = now.Add(linkLife)
	newBrowser(t, c).status(http.StatusForbidden, http.MethodPost, loginPath+"/link", url.Values{"token": {late}})

	// The session ends at its time, and with the logout.
	now = epoch.Add(8 * time.Hour)
	b.status(http.StatusSeeOther, http.MethodGet, "/console/", nil)
	b = newBrowser(t, c).signIn()
	stolen := b.cookies[sessionCookie]
	b.status(http.StatusSeeOther, http.MethodPost, "/console/logout", url.Values{})
	b.cookies[sessionCookie] = stolen
	b.status(http.StatusSeeOther, http.MethodGet, "/console/", nil)

	for range maxLinks {
		if _, _, err := c.NewLink("uid:0"); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := c.NewLink("uid:0"); !errors.Is(err, errTooManyLinks) {
		t.Errorf("one more link: %v", err)
	}
	off := testConsole(t, &world{}, func(c *Config) { c.Access = Access{} })
	newBrowser(t, off).status(http.StatusForbidden, http.MethodPost, loginPath+"/link", url.Values{"token": {"x"}})
	if _, _, err := off.NewLink("uid:0"); !errors.Is(err, ErrNoLinks) {
		t.Errorf("links are off: %v", err)
	}
}

// No other site can sign somebody in or out.
func TestV_J8_ForgedForms(t *testing.T) {
	c := testConsole(t, &world{text: "x"})
	b := newBrowser(t, c).signIn()
	b.change = func(r *http.Request) { r.Header.Set("Sec-Fetch-Site", "cross-site") }
	b.status(http.StatusForbidden, http.MethodPost, "/console/logout", url.Values{})
	b.status(http.StatusForbidden, http.MethodPost, loginPath+"/link", url.Values{"token": {token(t, c)}})
	b.change = func(r *http.Request) { r.Header.Set("Origin", "https://evil.example") }
	b.status(http.StatusForbidden, http.MethodPost, "/console/logout", url.Values{})
	b.change = nil
	b.status(http.StatusOK, http.MethodGet, "/console/", nil)
}

// A name that somebody else points here is refused (DNS rebinding), loopback or not.
func TestV_J1_NameOfAnother(t *testing.T) {
	c := testConsole(t, &world{text: "x"}, func(c *Config) { c.Names = []string{host, "127.0.0.1", "::1"} })
	b := newBrowser(t, c).signIn()
	for name, want := range map[string]int{
		host: http.StatusOK, host + ":8444": http.StatusOK, "CONSOLE.example.org.": http.StatusOK, "127.0.0.1:1": http.StatusOK, "[::1]:8444": http.StatusOK,
		"evil.example": http.StatusMisdirectedRequest, "localhost": http.StatusMisdirectedRequest, "": http.StatusMisdirectedRequest,
		host + ".evil.example": http.StatusMisdirectedRequest, "127.0.0.2": http.StatusMisdirectedRequest,
	} {
		b.change = func(r *http.Request) { r.Host = name }
		b.status(want, http.MethodGet, "/console/", nil)
	}
}

// No other site reads an answer, and none gets one for being on the same machine.
func TestV_J1_NoOtherOrigin(t *testing.T) {
	c := testConsole(t, &world{text: "secret-name"}, func(c *Config) { c.Names = []string{host, "localhost", "127.0.0.1"} })
	known, local := newBrowser(t, c).signIn(), newBrowser(t, c)
	known.change = func(r *http.Request) { r.Header.Set("Origin", "https://evil.example") }
	local.change = func(r *http.Request) { r.Host, r.RemoteAddr = "localhost:8444", "127.0.0.1:4711" }
	for _, path := range append(pagePaths, loginPath, "/console/events") {
		if path != "/console/events" { // which does not end
			for name := range known.get(path).Header {
				if strings.HasPrefix(name, "Access-Control-") {
					t.Errorf("%s: %s", path, name)
				}
			}
		}
		if resp := known.do(http.MethodOptions, path, nil); resp.Code < 400 {
			t.Errorf("OPTIONS %s: %d", path, resp.Code)
		}
		if resp := local.get(path); resp.Code == http.StatusOK && path != loginPath || strings.Contains(resp.Body, "secret-name") {
			t.Errorf("%s from the same machine: %d", path, resp.Code)
		}
	}
}

// Nothing changes anything, and nothing but the way in answers strangers, whatever the
// method and the path.
func TestV_J2_NothingForStrangers(t *testing.T) {
	c := testConsole(t, &world{text: "secret-name"})
	paths := append([]string{
		"/", "/console", "/metrics", "/healthz", "/debug/pprof/", "/debug/vars", "/shutdown", "/quit", "/reload", "/-/quit", "/api/v1/nodes",
		"/console/debug/pprof/", "/console/../debug/pprof/", "/console/logout", loginPath, loginPath + "/link", loginPath + "/oidc", loginPath + "/callback", "/console/events",
	}, pagePaths...)
	for _, who := range []*browser{newBrowser(t, c), newBrowser(t, c).signIn()} {
		stranger := len(who.cookies) == 0
		for _, path := range paths {
			for _, method := range []string{http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete, http.MethodTrace, "DEBUG"} {
				reads := method == http.MethodGet || method == http.MethodHead
				if !stranger && (reads || path == "/console/logout" && method == http.MethodPost) {
					continue
				}
				resp := who.do(method, path, nil)
				if ok := resp.Code < 300; ok != (reads && path == loginPath) || stranger && strings.Contains(resp.Body, "secret-name") {
					t.Errorf("%s %s: %d", method, path, resp.Code)
				}
			}
		}
	}
}

// Sessions and links are found by the hash of what the browser brings: the time that
// takes tells nothing of those that there are, nor does the memory.
func TestV_J9_SecretsAreFoundByTheirHash(t *testing.T) {
	c := testConsole(t, &world{text: "x"})
	link := token(t, c)
	if _, ok := c.links.all[sha256.Sum256([]byte(link))]; !ok || len(c.links.all) != 1 {
		t.Errorf("links are kept as %v", c.links.all)
	}
	b := newBrowser(t, c).signIn()
	session := b.cookies[sessionCookie]
	if _, ok := c.sessions.all[sha256.Sum256([]byte(session))]; !ok || len(c.sessions.all) != 1 {
		t.Errorf("sessions are kept as %v", c.sessions.all)
	}
	for _, secret := range []string{link, session} {
		if len(secret) < 26 || strings.Contains(fmt.Sprint(c.links.all, c.sessions.all), secret) {
			t.Error("the secret is short, or kept")
		}
	}
}

func TestLocal(t *testing.T) {
	for _, elsewhere := range []string{
		"", "/", "//evil.example", "https://evil.example/console/", "/console", "/consolex/", `/console/\evil`, "/console//evil.example", "/console/login",
		"/console/events", "/console/a b", "/console/\r\nX: y", "javascript:alert(1)", "/console/ü", "/console/" + strings.Repeat("a", maxURLBytes),
	} {
		if got := local(elsewhere); got != "/console/" {
			t.Errorf("local(%.40q) = %q", elsewhere, got)
		}
	}
	for _, ours := range []string{"/console/", "/console/ledger?identity=spiffe%3A%2F%2Fexample.org%2Fa", "/console/ledger/7"} {
		if got := local(ours); got != ours {
			t.Errorf("local(%q) = %q", ours, got)
		}
	}
}

func TestTries(t *testing.T) {
	now := epoch
	c := testConsole(t, &world{text: "x"}, func(c *Config) { c.Now = func() time.Time { return now } })
	b := newBrowser(t, c)
	for range maxTries {
		b.status(http.StatusForbidden, http.MethodPost, loginPath+"/link", url.Values{"token": {"wrong"}})
	}
	good := token(t, c)
	b.status(http.StatusTooManyRequests, http.MethodPost, loginPath+"/link", url.Values{"token": {good}})
	b.change = func(r *http.Request) { r.RemoteAddr = "198.51.100.7:1" } // somebody else is not in the way
	b.status(http.StatusSeeOther, http.MethodPost, loginPath+"/link", url.Values{"token": {good}})
	now = now.Add(triesPer)
	if !c.tries.take("192.0.2.1:1", now) {
		t.Error("still refused after a minute")
	}
	for i := range 3 * maxAddresses {
		c.tries.take(string(rune('a'+i%26))+strings.Repeat("x", i%100)+string(rune(i)), now)
	}
	if n := len(c.tries.count); n > maxAddresses+1 {
		t.Errorf("%d addresses are remembered", n)
	}
}

func TestExpiringIsBounded(t *testing.T) {
	s := newExpiring[string](maxSessions)
	s.displace(keyOf("first"), "first", epoch, epoch.Add(time.Hour))
	for i := range maxSessions {
		s.displace(keyOf(fmt.Sprint(i)), "next", epoch, epoch.Add(time.Hour+time.Duration(i+1)))
	}
	if s.count() != maxSessions {
		t.Errorf("%d values", s.count())
	}
	if _, ok := s.get(keyOf("first"), epoch); ok {
		t.Error("the one that ends first is still there")
	}
	last := keyOf(fmt.Sprint(maxSessions - 1))
	if v, ok := s.get(last, epoch); !ok || v != "next" {
		t.Error("the newest is not there")
	}
	if s.add(keyOf("more"), "more", epoch, epoch.Add(time.Hour)) {
		t.Error("one more than there is room for")
	}
	if _, ok := s.take(last, epoch.Add(2*time.Hour)); ok {
		t.Error("it was taken after its end")
	}
	if !s.add(keyOf("more"), "more", epoch.Add(2*time.Hour), epoch.Add(3*time.Hour)) || s.count() != 1 {
		t.Errorf("after their end %d are there", s.count())
	}
}

// TestCertificates: only the configured CA's, only the named subjects, only while
// they are valid; and X.509-SVIDs as the server judges them.
func TestCertificates(t *testing.T) {
	ca, other := newTestCA(t), newTestCA(t)
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	svid := ca.issue(t, "an svid", x509.ExtKeyUsageClientAuth, epoch.Add(time.Hour))
	c := testConsole(t, &world{text: "x"}, func(c *Config) {
		c.Access = Access{ClientCAs: pool, Subjects: []string{"CN=alice", "bob@example.org"}, Admin: func(_ context.Context, s *tls.ConnectionState) (string, error) {
			if s.PeerCertificates[0].Equal(svid) {
				return "spiffe://example.org/admin", nil
			}
			return "", errors.New("no admin")
		}}
	})
	for name, tc := range map[string]struct {
		cert *x509.Certificate
		want int
	}{
		"named":         {ca.issue(t, "alice", x509.ExtKeyUsageClientAuth, epoch.Add(time.Hour)), http.StatusOK},
		"an admin":      {svid, http.StatusOK},
		"not named":     {ca.issue(t, "mallory", x509.ExtKeyUsageClientAuth, epoch.Add(time.Hour)), http.StatusSeeOther},
		"another ca":    {other.issue(t, "alice", x509.ExtKeyUsageClientAuth, epoch.Add(time.Hour)), http.StatusSeeOther},
		"expired":       {ca.issue(t, "alice", x509.ExtKeyUsageClientAuth, epoch.Add(-time.Minute)), http.StatusSeeOther},
		"of a server":   {ca.issue(t, "alice", x509.ExtKeyUsageServerAuth, epoch.Add(time.Hour)), http.StatusSeeOther},
		"the ca itself": {ca.cert, http.StatusSeeOther},
	} {
		b := newBrowser(t, c)
		b.tls = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{tc.cert}}
		t.Run(name, func(t *testing.T) {
			b.t = t
			b.status(tc.want, http.MethodGet, "/console/", nil)
		})
	}
}

// Whoever signs in is in the ledger before anything is seen, by whatever means, once;
// and whoever is refused.
func TestSignInsAreRecorded(t *testing.T) {
	ca := newTestCA(t)
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	alice := ca.issue(t, "alice", x509.ExtKeyUsageClientAuth, epoch.Add(24*time.Hour))
	mallory := ca.issue(t, "mallory", x509.ExtKeyUsageClientAuth, epoch.Add(24*time.Hour))
	now := epoch
	w := &world{text: "secret-name"}
	c := testConsole(t, w, func(c *Config) {
		c.Access, c.Now = Access{ClientCAs: pool, Subjects: []string{"CN=alice"}, Links: true}, func() time.Time { return now }
	})
	const address = "192.0.2.1:1234"
	sum := func(c *x509.Certificate) []byte { s := sha256.Sum256(c.Raw); return s[:] }
	expect := func(when string, want ...signIn) {
		t.Helper()
		if d := cmp.Diff(want, w.takeSignIns(), protocmp.Transform()); d != "" {
			t.Errorf("%s: %s", when, d)
		}
	}
	b := newBrowser(t, c)
	b.get("/console/")
	expect("of a stranger who only looks")
	b.signIn().get("/console/")
	b.get("/console/nodes")
	expect("by a link", signIn{Who: "uid:0", In: &ledgerv1.SignIn{Method: "link", Address: address}})
	b.status(http.StatusForbidden, http.MethodPost, loginPath+"/link", url.Values{"token": {"canary"}})
	expect("by a wrong link", signIn{In: &ledgerv1.SignIn{Method: "link", Address: address}, Reason: reasonLink})
	for range maxTries {
		b.do(http.MethodPost, loginPath+"/link", url.Values{"token": {"canary"}})
	}
	if all := w.takeSignIns(); len(all) != maxTries || all[maxTries-1].Reason != reasonTooMany {
		t.Errorf("after too many: %v", all)
	}
	by := func(cert *x509.Certificate) *browser {
		b := newBrowser(t, c)
		b.tls = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{cert}}
		return b
	}
	mtls := signIn{Who: "CN=alice", In: &ledgerv1.SignIn{Method: "mtls", Address: address, CertificateSha256: sum(alice)}}
	for range 3 {
		by(alice).status(http.StatusOK, http.MethodGet, "/console/", nil)
	}
	expect("by a certificate", mtls)
	now = now.Add(8 * time.Hour)
	by(alice).status(http.StatusOK, http.MethodGet, "/console/", nil)
	expect("by a certificate, the next day", mtls)
	by(mallory).status(http.StatusSeeOther, http.MethodGet, "/console/", nil)
	expect("by another certificate", signIn{In: &ledgerv1.SignIn{Method: "mtls", Address: address, CertificateSha256: sum(mallory)}, Reason: reasonCertificate})

	// What cannot be recorded does not happen.
	w.mu.Lock()
	w.ledgerErr = errors.New("the disk is full")
	w.mu.Unlock()
	now = now.Add(8 * time.Hour)
	if page := by(alice).status(http.StatusServiceUnavailable, http.MethodGet, "/console/", nil).Body; strings.Contains(page, "secret-name") {
		t.Error("it is shown all the same")
	}
	late := newBrowser(t, c)
	late.status(http.StatusServiceUnavailable, http.MethodPost, loginPath+"/link", url.Values{"token": {token(t, c)}})
	if _, in := late.cookies[sessionCookie]; in {
		t.Error("signed in")
	}
	late.status(http.StatusSeeOther, http.MethodGet, "/console/", nil)
	w.mu.Lock()
	w.ledgerErr = nil
	w.mu.Unlock()
	by(alice).status(http.StatusOK, http.MethodGet, "/console/", nil)
	expect("when it can be written again", mtls)
}
