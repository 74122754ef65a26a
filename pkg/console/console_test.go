package console

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/net/html"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"

	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/ledger/search"
)

const host = "console.example.org"

var epoch = time.Date(2026, 11, 25, 20, 49, 14, 0, time.UTC)

// hostile are names and labels as an attacker would choose them.
var hostile = []string{
	`<script>alert(1)</script>`, `"><img src=x onerror=alert(1)>`, `' onmouseover='alert(1)`, `javascript:alert(1)`,
	`</title><script>alert(1)</script>`, `</textarea><svg onload=alert(1)>`, `{{.}}`, "`${alert(1)}`", `<!--`, `]]>`,
	"a\u202egnp.exe", "b\u2066c\u2069", "\x1b[31mred", "null\x00byte", "line\nbreak\r\n", "bad\xffutf8", `&lt;script&gt;`, `<a href="//evil.example">`,
	strings.Repeat("W", 10<<10),
}

// world is a CA as the console sees it. What is hostile is everywhere.
type world struct {
	mu       sync.Mutex // guards what follows
	text     string     // in every name
	err      error
	asked    []search.Query
	deadline bool // each question had one
	covered  bool

	ledgerErr error
	signedIn  []signIn
}

// signIn is one that was recorded; with a reason, one that was refused.
type signIn struct {
	Who    string
	In     *ledgerv1.SignIn
	Reason string
}

func (w *world) RecordSignIn(_ context.Context, who string, in *ledgerv1.SignIn) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ledgerErr != nil {
		return w.ledgerErr
	}
	w.signedIn = append(w.signedIn, signIn{Who: who, In: in})
	return nil
}

func (w *world) RecordRefusedSignIn(_ context.Context, who string, in *ledgerv1.SignIn, reason, detail string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if strings.Contains(detail, "canary") {
		reason += " and a secret"
	}
	w.signedIn = append(w.signedIn, signIn{Who: who, In: in, Reason: reason})
}

// takeSignIns returns what was recorded since it was called last.
func (w *world) takeSignIns() []signIn {
	w.mu.Lock()
	defer w.mu.Unlock()
	all := w.signedIn
	w.signedIn = nil
	return all
}

func (w *world) Below(_ context.Context, root string) (string, []string, error) {
	if root != "aa" {
		return "", nil, fmt.Errorf("%s: %w", root, search.ErrNoRoot)
	}
	return root, []string{"bb", "cc"}, nil
}

func (w *world) Who(ctx context.Context, q search.Holders) ([]search.Found, search.Position, error) {
	w.mu.Lock()
	w.asked = append(w.asked, search.Query{SPIFFEID: q.SPIFFEID, Node: q.Node, Authority: strings.Join(q.Authorities, " "), Limit: q.Limit})
	w.mu.Unlock()
	return []search.Found{w.found(7)}, search.Position{Key: 5, Record: 7, Valid: true}, w.ask(ctx)
}

func (w *world) GetStatus(context.Context, *adminv1.GetStatusRequest) (*adminv1.GetStatusResponse, error) {
	return &adminv1.GetStatusResponse{
		TrustDomain: "example.org", Instance: w.text, Version: "1.0", StartedAt: timestamppb.New(epoch.Add(-time.Hour)), Revision: 4,
		BundleSequence: 2, Entries: 1, Nodes: 2, Records: 1234, OutageBudget: durationpb.New(30 * time.Minute),
		Conditions: []*adminv1.Condition{{Name: "entries", Severity: "warning", Message: w.text, Since: timestamppb.New(epoch)}, {Name: "ledger", Severity: "ok"}},
	}, nil
}

func (w *world) ListNodes(context.Context, *adminv1.ListNodesRequest) (*adminv1.ListNodesResponse, error) {
	return &adminv1.ListNodesResponse{Nodes: []*adminv1.Node{
		{
			Id: "spiffe://example.org/meshid/node/join_token/" + w.text, State: "active", Connected: true, Revision: 4, AgentVersion: w.text, Address: w.text,
			Attributes: &attributesv1.Node{Labels: map[string]string{w.text: w.text}}, AttestedAt: timestamppb.New(epoch), SvidNotAfter: timestamppb.New(epoch.Add(time.Hour)),
		},
		{Id: "spiffe://example.org/meshid/node/join_token/z", State: "banned", StateReason: w.text, AttestedAt: timestamppb.New(epoch)},
	}}, nil
}

func (w *world) ListEntries(context.Context, *adminv1.ListEntriesRequest) (*adminv1.ListEntriesResponse, error) {
	return &adminv1.ListEntriesResponse{Revision: 4, Entries: []*entryv1.Entry{
		{Name: w.text, SpiffeId: w.text, Nodes: w.text, Workloads: w.text, Admin: true, AcceptWeak: true},
	}}, nil
}

func (w *world) ListAuthorities(context.Context, *adminv1.ListAuthoritiesRequest) (*adminv1.ListAuthoritiesResponse, error) {
	root := func(id, role string) *adminv1.Authority {
		return &adminv1.Authority{Id: id, Role: role, State: "active", Tainted: role == "root", NotBefore: timestamppb.New(epoch.Add(-time.Hour)), NotAfter: timestamppb.New(epoch.Add(time.Hour)), Certificate: authorityCert}
	}
	return &adminv1.ListAuthoritiesResponse{Authorities: []*adminv1.Authority{root("aa", "root"), root("bb", "intermediate")}}, nil
}

// authorityCert is one that the root "aa" has signed.
var authorityCert = makeCert(&x509.Certificate{
	SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: `<script>alert(1)</script>`}, AuthorityKeyId: []byte{0xaa}, SubjectKeyId: []byte{0xbb},
	NotBefore: epoch, NotAfter: epoch.Add(time.Hour),
})

func makeCert(t *x509.Certificate) []byte {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	parent := *t
	parent.SubjectKeyId = t.AuthorityKeyId
	der, err := x509.CreateCertificate(rand.Reader, t, &parent, key.Public(), key)
	if err != nil {
		panic(err)
	}
	return der
}

func (w *world) found(index uint64) search.Found {
	t := w.text
	r := &ledgerv1.Record{
		Version: 1, Time: timestamppb.New(epoch.Add(-time.Minute)), Event: ledgerv1.Event_EVENT_ISSUE, Outcome: ledgerv1.Outcome_OUTCOME_REFUSED, Reason: t, Detail: t,
		SpiffeId: t, Instance: t, RequestId: t, Actor: t, Diff: t, Miss: &ledgerv1.Miss{Field: t, Term: t, Why: t}, Entry: &ledgerv1.EntryRef{Name: t},
		Workload:    &attributesv1.Workload{Docker: &attributesv1.Docker{Name: t, Labels: map[string]string{t: t}}, Unix: &attributesv1.Unix{Path: t, Groups: []int64{1}}},
		Node:        &ledgerv1.NodeRef{Id: "spiffe://example.org/meshid/node/" + t, Address: t},
		Certificate: &ledgerv1.Certificate{Serial: []byte{1, 2}, DnsNames: []string{t}}, Took: durationpb.New(time.Millisecond),
		Summary: &ledgerv1.Summary{Count: 3},
	}
	return search.Found{Entry: ledger.Entry{Index: index, Record: r, Raw: []byte(t)}, Anomalies: []string{"key_reuse"}}
}

func (w *world) ask(ctx context.Context) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if d, ok := ctx.Deadline(); !ok || time.Until(d) > queryTimeout {
		w.deadline = false
	}
	return w.err
}

func (w *world) Find(ctx context.Context, q search.Query) ([]search.Found, search.Position, error) {
	w.mu.Lock()
	w.asked = append(w.asked, q)
	w.mu.Unlock()
	return []search.Found{w.found(7)}, search.Position{Key: 5, Record: 7, Valid: true}, w.ask(ctx)
}

func (w *world) Record(ctx context.Context, index uint64) (search.Found, error) {
	if index > 1000 {
		return search.Found{}, search.ErrNoRecord
	}
	return w.found(index), w.ask(ctx)
}

func (w *world) Tallies(ctx context.Context, since, _ time.Time, _ time.Duration) ([]search.Tally, error) {
	return []search.Tally{
		{Start: since, Event: ledgerv1.Event_EVENT_ISSUE, Outcome: ledgerv1.Outcome_OUTCOME_SUCCESS, Total: 1000},
		{Start: since, Event: ledgerv1.Event_EVENT_ISSUE, Outcome: ledgerv1.Outcome_OUTCOME_REFUSED, Reason: w.text, Total: 3},
		{Start: since.Add(-time.Hour), Event: ledgerv1.Event_EVENT_ISSUE, Outcome: ledgerv1.Outcome_OUTCOME_SUCCESS, Total: 1}, // outside
	}, w.ask(ctx)
}

func (w *world) EntryTallies(ctx context.Context, _ time.Time) ([]search.EntryTally, error) {
	return []search.EntryTally{{Entry: w.text, Issued: 12, Refused: 1, Last: epoch}}, w.ask(ctx)
}

func (w *world) Identities(ctx context.Context, _ time.Time, _, _ string, limit int) ([]search.Identity, error) {
	if limit != pageRows+1 {
		return nil, fmt.Errorf("asked for %d identities", limit)
	}
	return []search.Identity{{SPIFFEID: w.text, Certificates: 2, Nodes: 1, Overdue: 1, First: epoch, Last: epoch}}, w.ask(ctx)
}

func (w *world) Horizon(ctx context.Context, _ time.Time, _ time.Duration, steps int) (search.Horizon, error) {
	h := search.Horizon{Expiring: make([]uint64, steps), Active: 5, Overdue: 1}
	h.Expiring[0] = 5
	return h, w.ask(ctx)
}

func (w *world) Prove(index uint64, _ []byte) (Proof, error) {
	if index == 13 {
		return Proof{}, errors.New("record 13 is another: " + w.text)
	}
	return Proof{Size: 100, Origin: w.text, Covered: w.covered, Hashes: 7}, nil
}
func (w *world) Newest() Proof { return Proof{Size: 100, Origin: w.text} }
func (w *world) Halted() error { return nil }

// browser is a browser with a cookie jar of its own.
type browser struct {
	t       testing.TB
	c       *Console
	cookies map[string]string
	// tls is the connection's state; nil for one without a client certificate.
	tls    *tls.ConnectionState
	change func(*http.Request)
}

func newBrowser(t testing.TB, c *Console) *browser {
	return &browser{t: t, c: c, cookies: make(map[string]string)}
}

// answer is what a browser got.
type answer struct {
	Code   int
	Header http.Header
	Body   string
}

func (b *browser) do(method, path string, form url.Values) answer {
	b.t.Helper()
	var body io.Reader = http.NoBody
	if form != nil {
		body = strings.NewReader(form.Encode())
	}
	r := httptest.NewRequestWithContext(b.t.Context(), method, "https://"+host+path, body)
	r.TLS = &tls.ConnectionState{}
	if b.tls != nil {
		r.TLS = b.tls
	}
	if form != nil {
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	for k, v := range b.cookies {
		r.AddCookie(&http.Cookie{Name: k, Value: v})
	}
	if b.change != nil {
		b.change(r)
	}
	w := httptest.NewRecorder()
	b.c.ServeHTTP(w, r)
	resp := w.Result()
	if err := resp.Body.Close(); err != nil {
		b.t.Error(err)
	}
	for _, k := range resp.Cookies() {
		if !k.Secure || !k.HttpOnly || k.SameSite != http.SameSiteLaxMode || k.Path != "/" || k.Domain != "" || !strings.HasPrefix(k.Name, "__Host-") {
			b.t.Errorf("cookie %v: want Secure, HttpOnly, SameSite=Lax, __Host-", k)
		}
		if k.MaxAge < 0 {
			delete(b.cookies, k.Name)
		} else {
			b.cookies[k.Name] = k.Value
		}
	}
	return answer{resp.StatusCode, resp.Header, w.Body.String()}
}

func (b *browser) get(path string) answer { return b.do(http.MethodGet, path, nil) }

// status does a request and checks how it is answered.
func (b *browser) status(want int, method, path string, form url.Values) answer {
	b.t.Helper()
	resp := b.do(method, path, form)
	if resp.Code != want {
		b.t.Errorf("%s %.80s: %d: want %d", method, path, resp.Code, want)
	}
	return resp
}

// token makes a link and returns its token.
func token(t testing.TB, c *Console) string {
	t.Helper()
	path, _, err := c.NewLink("uid:0")
	if err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(path)
	if err != nil {
		t.Fatal(err)
	}
	return u.Query().Get("token")
}

// signIn signs in with a link.
func (b *browser) signIn() *browser {
	b.t.Helper()
	b.status(http.StatusSeeOther, http.MethodPost, loginPath+"/link", url.Values{"token": {token(b.t, b.c)}})
	return b
}

func testConsole(t testing.TB, w *world, change ...func(*Config)) *Console {
	t.Helper()
	w.deadline = true
	cfg := Config{
		Names: []string{host}, Fleet: w, Rules: w, Authorities: w, Ledger: w, Index: w, Tree: w, Access: Access{Links: true}, Now: func() time.Time { return epoch },
		Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
	}
	for _, c := range change {
		c(&cfg)
	}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

var pagePaths = []string{
	"/console/", "/console/nodes", "/console/nodes?q=z&state=withdrawn", "/console/identities", "/console/issuance?span=7d", "/console/authorities",
	"/console/entries", "/console/ledger", "/console/ledger?identity=x&since=24h&event=issue&outcome=refused", "/console/ledger?since=yesterday",
	"/console/holders?root=aa", "/console/holders?root=%3Cscript%3E", "/console/holders?authority=bb&all=1&after=5.7", "/console/holders?identity=x&node=y", "/console/holders",
	"/console/ledger/7", "/console/ledger/13", "/console/ledger/5000", "/console/none",
}

// Every answer has the headers, whoever asks for whatever.
func TestV_J8_Headers(t *testing.T) {
	c := testConsole(t, &world{text: "x"})
	known, stranger := newBrowser(t, c).signIn(), newBrowser(t, c)
	foreign := newBrowser(t, c)
	foreign.change = func(r *http.Request) { r.Host = "evil.example" }
	for _, b := range []*browser{known, stranger, foreign} {
		for _, path := range append(pagePaths, "/", "/console", loginPath, loginPath+"?token=x", "/console/assets/none", c.pages.assetPath("style.css"), "/console/logout", "/%zz") {
			if path == "/%zz" {
				continue
			}
			h := b.get(path).Header
			for name, want := range map[string]string{
				"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY",
				"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin",
			} {
				if h.Get(name) != want {
					t.Errorf("%s: %s is %q", path, name, h.Get(name))
				}
			}
			if cache := h.Get("Cache-Control"); cache != "no-store" && !strings.HasPrefix(path, "/console/assets/") {
				t.Errorf("%s: Cache-Control is %q", path, cache)
			}
		}
	}
	for _, word := range []string{"unsafe-inline", "unsafe-eval", "*", "data:", "http:"} {
		if strings.Contains(policy, word) {
			t.Errorf("the policy has %s", word)
		}
	}
}

// assetPath is the address of an asset.
func (p *pages) assetPath(file string) string {
	base, _, _ := strings.Cut(file, ".")
	for name := range p.assets {
		if strings.HasPrefix(name, base+"-") {
			return prefix + "/assets/" + name
		}
	}
	return ""
}

// What others chose is text on every page, and nothing else.
func TestV_J8_HostileText(t *testing.T) {
	for i, s := range hostile {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			w := &world{text: s, covered: i%2 == 0}
			b := newBrowser(t, testConsole(t, w)).signIn()
			for _, path := range pagePaths {
				page := b.get(path).Body
				checkPage(t, path, page)
				if len(page) > 400<<10 {
					t.Errorf("%s has %d bytes", path, len(page))
				}
			}
			q := url.QueryEscape(s)
			for _, path := range []string{
				"/console/nodes?q=" + q, "/console/identities?q=" + q, "/console/entries?q=" + q, "/console/issuance?span=" + q,
				"/console/ledger?identity=" + q + "&node=" + q + "&since=" + q, "/console/holders?root=" + q, "/console/holders?identity=" + q + "&node=" + q, "/console/ledger?serial=" + q, "/console/ledger?event=" + q, loginPath + "?token=" + q + "&to=" + q,
			} {
				if len(path) < maxURLBytes {
					checkPage(t, path, b.get(path).Body)
				}
			}
		})
	}
}

var scriptSource = regexp.MustCompile(`^/console/assets/live-[0-9a-f]{12}\.js$`)

// checkPage parses a page as a browser does and looks for anything that could act.
func checkPage(t testing.TB, path, page string) {
	t.Helper()
	doc, err := html.Parse(strings.NewReader(page))
	if err != nil {
		t.Fatal(err)
	}
	for n := range doc.Descendants() {
		if n.Type == html.CommentNode {
			t.Errorf("%s: a comment: %.60q", path, n.Data)
		}
		if n.Type == html.TextNode {
			for _, r := range n.Data {
				if r == '\u202e' || r == '\u2066' || r == '\x1b' || r == 0 {
					t.Errorf("%s: character %U in text", path, r)
				}
			}
		}
		if n.Type != html.ElementNode {
			continue
		}
		switch n.Data {
		case "iframe", "object", "embed", "base", "style", "textarea", "template", "foreignobject":
			t.Errorf("%s: element %s", path, n.Data)
		case "script":
			src := ""
			for _, a := range n.Attr {
				if a.Key == "src" {
					src = a.Val
				}
			}
			if !scriptSource.MatchString(src) || n.FirstChild != nil {
				t.Errorf("%s: a script from %q", path, src)
			}
		}
		for _, a := range n.Attr {
			switch {
			case strings.HasPrefix(a.Key, "on"), a.Key == "style", a.Key == "srcdoc":
				t.Errorf("%s: attribute %s=%.60q of %s", path, a.Key, a.Val, n.Data)
			case a.Key == "href", a.Key == "src", a.Key == "action":
				if !strings.HasPrefix(a.Val, "/console/") && a.Val != "#main" || strings.HasPrefix(a.Val, "//") {
					t.Errorf("%s: %s=%.60q leads elsewhere", path, a.Key, a.Val)
				}
			}
		}
	}
}

func TestBounds(t *testing.T) {
	w := &world{text: "x"}
	c := testConsole(t, w)
	b := newBrowser(t, c).signIn()
	for _, path := range pagePaths {
		b.get(path)
	}
	if !w.deadline {
		t.Error("a question had no deadline")
	}
	for _, q := range w.asked {
		if q.Limit <= 0 || q.Limit > pageRows {
			t.Errorf("asked for %d records", q.Limit)
		}
	}
	b.status(http.StatusRequestURITooLong, http.MethodGet, "/console/ledger?identity="+strings.Repeat("a", maxURLBytes), nil)
	b.status(http.StatusBadRequest, http.MethodGet, "/console/ledger?identity="+strings.Repeat("a", maxFilter+1), nil)
	for _, bad := range []string{"since=x", "until=x", "serial=xyz", "event=x", "outcome=x", "after=1", "after=a.b"} {
		b.status(http.StatusBadRequest, http.MethodGet, "/console/ledger?"+bad, nil)
	}
	b.status(http.StatusNotFound, http.MethodGet, "/console/ledger/-1", nil)
	b.status(http.StatusNotFound, http.MethodGet, "/console/ledger/18446744073709551615", nil)
	b.status(http.StatusNotFound, http.MethodPost, "/console/nodes", url.Values{})
	b.status(http.StatusForbidden, http.MethodPost, loginPath+"/link", url.Values{"token": {strings.Repeat("a", 2*maxBodyBytes)}})

	w.err = context.DeadlineExceeded
	b.status(http.StatusServiceUnavailable, http.MethodGet, "/console/identities", nil)
	w.err = errors.New("disk <script> failed")
	if page := b.status(http.StatusServiceUnavailable, http.MethodGet, "/console/identities", nil).Body; strings.Contains(page, "disk") {
		t.Error("the error is shown")
	}

	for range maxRequests {
		c.places <- struct{}{}
	}
	b.status(http.StatusServiceUnavailable, http.MethodGet, "/console/", nil)
}

func TestWithoutIndex(t *testing.T) {
	b := newBrowser(t, testConsole(t, &world{text: "x"}, func(c *Config) { c.Index = nil })).signIn()
	for _, path := range []string{"/console/", "/console/nodes", "/console/identities", "/console/issuance", "/console/authorities", "/console/entries", "/console/ledger"} {
		page := b.status(http.StatusOK, http.MethodGet, path, nil).Body
		if path != "/console/nodes" && path != "/console/authorities" && !strings.Contains(page, "ledger_search") {
			t.Errorf("%s does not say that the index is missing", path)
		}
	}
	b.status(http.StatusNotFound, http.MethodGet, "/console/ledger/7", nil)
}

func TestFacts(t *testing.T) {
	w := &world{text: "v", covered: true}
	b := newBrowser(t, testConsole(t, w)).signIn()
	for path, want := range map[string][]string{
		"/console/":            {"1 problem", "1,234", "1,000", "30m", "2026-11-25 20:48:14 UTC"},
		"/console/nodes":       {"revision", "banned", "v=v", "1 <small>of 2</small>"},
		"/console/identities":  {"1 overdue", "Expiry horizon"},
		"/console/issuance":    {"24 hours", "1,000 issued", "3 refused"},
		"/console/authorities": {"1h left", "until 2026-11-25 21:49:14 UTC", `active</span> <span class="tag tainted">tainted</span>`},
		"/console/entries":     {"admin", "weak", "12"},
		"/console/ledger":      {"key_reuse", "(3 alike)", "after=5.7"},
		"/console/ledger/7":    {"In the tree", "7 steps", "ca ledger prove --serial 0102"},
		"/console/ledger/13":   {"The proof failed"},
	} {
		page := b.status(http.StatusOK, http.MethodGet, path, nil).Body
		for _, s := range want {
			if !strings.Contains(page, s) {
				t.Errorf("%s lacks %q", path, s)
			}
		}
	}
	w.covered = false
	if page := b.get("/console/ledger/7").Body; !strings.Contains(page, "Not in the tree yet") || !strings.Contains(page, "data-live") {
		t.Error("a record without proof is not waited for")
	}
}

func TestText(t *testing.T) {
	for in, want := range map[string]string{
		"plain ü": "plain ü", "a\u202eb": `a\u202eb`, "\x00": `\x00`, "\xff": "\ufffd",
		strings.Repeat("x", 300): strings.Repeat("x", maxText) + "… (300 bytes)",
	} {
		if got := text(in); got != want {
			t.Errorf("text(%.20q) = %.60q, want %.60q", in, got, want)
		}
	}
	if got := lines("-a\n+b\tc\u202e\n"); got != "-a\n+b    c\\u202e\n" {
		t.Errorf("lines: %q", got)
	}
	if got := count(uint64(1234567)); got != "1,234,567" {
		t.Errorf("count: %s", got)
	}
	for n, want := range map[uint64]uint64{0: 1, 1: 1, 3: 5, 10: 10, 11: 20, 1001: 2000} {
		if got := niceTop(n); got != want {
			t.Errorf("niceTop(%d) = %d, want %d", n, got, want)
		}
	}
}
