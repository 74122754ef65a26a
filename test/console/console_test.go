// Package console looks at the web console of a running CA with a real browser, as
// an operator does.
package console

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

// patience bounds every wait: a loaded machine is slow, and only a failure waits
// this long.
const patience = 2 * time.Minute

// fetchFrom has this program be a workload: it is the address of the agent.
const fetchFrom = "MESHID_TEST_FETCH_FROM"

func TestMain(m *testing.M) {
	if address := os.Getenv(fetchFrom); address != "" {
		os.Exit(workload(address)) //nolint:forbidigo // as every TestMain
	}
	os.Exit(local.Main(m)) //nolint:forbidigo // as every TestMain
}

// workload gets an X.509-SVID, says so, and stays until its standard input ends.
func workload(address string) int {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // it ends, that is all
		cancel()
	}()
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(address)))
	if err != nil {
		return 1
	}
	fmt.Fprintln(os.Stdout, "ready")
	<-ctx.Done()
	_ = source.Close() // it ends with the process
	return 0
}

// hostile is a name that would act if it were more than text. A file may have it.
const hostile = `<img src=x onerror=owned=1>"'><script>owned=1<|script>` + "\u202e"

const entries = `
- {name: me, spiffe_id: 'spiffe://example.org/shop/checkout', workloads: unix.uid == 0 && unix.path.endsWith("checkout"), ttl: 30m}
- {name: other, spiffe_id: 'spiffe://example.org/shop/other', workloads: unix.uid == 0 && unix.path.contains("onerror")}
- {name: late, spiffe_id: 'spiffe://example.org/shop/late', workloads: unix.uid == 0 && unix.path.endsWith("late")}
- {name: operators, spiffe_id: 'spiffe://example.org/operators', nodes: node.id == "bastion", workloads: unix.uid == 4711, admin: true}
`

// site is a CA with a console, a node and workloads.
type site struct {
	ca    *local.CA
	agent *local.Agent
	url   string
}

func start(t *testing.T) *site {
	t.Helper()
	require.Root(t)
	listen := local.FreeAddress(t)
	ca := local.StartCA(t, local.CAOptions{Config: fmt.Sprintf("console: {listen: '%s', one_time_link: true}\n", listen)})
	ca.Apply(t, entries)
	s := &site{ca: ca, url: "https://" + listen}
	if !strings.Contains(ca.Log(), "console: "+s.url+"/console/login?token=") {
		t.Errorf("no link was printed at the start:\n%s", ca.Log())
	}
	s.agent = ca.StartAgent(t, "web-1", local.AgentOptions{Labels: map[string]string{"rack": "r1", hostile: hostile}})
	s.run(t, "checkout")
	s.run(t, hostile)
	return s
}

// run starts a workload with this name, and waits until it has its identity.
func (s *site) run(t *testing.T, name string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), name)
	content, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, content, 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path) // it ends with its standard input
	cmd.Env = append(os.Environ(), fetchFrom+"="+s.agent.Address())
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = in.Close()
		_ = cmd.Wait()
	})
	ready := make(chan error, 1)
	go func() {
		line, err := bufio.NewReader(out).ReadString('\n')
		if err == nil && line != "ready\n" {
			err = fmt.Errorf("it says %q", line)
		}
		ready <- err
	}()
	select {
	case err = <-ready:
	case <-time.After(patience):
		err = errors.New("it got no identity in time")
	}
	if err != nil {
		_ = cmd.Process.Kill()
		t.Fatalf("workload %s: %v", name, err)
	}
}

// browser is a tab of Chromium.
type browser struct {
	context.Context //nolint:containedctx // chromedp keeps the tab in it

	mu       sync.Mutex // guards what follows
	problems []string
}

// open starts a browser that trusts whatever certificate it is shown.
func open(t *testing.T) *browser {
	t.Helper()
	options := append(slices.Clone(chromedp.DefaultExecAllocatorOptions[:]),
		chromedp.ExecPath(require.Program(t, "chromium")), chromedp.NoSandbox, chromedp.DisableGPU,
		chromedp.NoFirstRun, chromedp.WSURLReadTimeout(patience), chromedp.IgnoreCertErrors,
		chromedp.Flag("disable-quic", true), chromedp.Flag("disable-background-networking", true), chromedp.Flag("disable-component-update", true),
		chromedp.Flag("disable-sync", true), chromedp.Flag("disable-crash-reporter", true), chromedp.Flag("disable-dev-shm-usage", true))
	allocator, stop := chromedp.NewExecAllocator(t.Context(), options...)
	t.Cleanup(stop)
	tab, closeTab := chromedp.NewContext(allocator)
	t.Cleanup(func() {
		_ = chromedp.Cancel(tab) // it ends the browser, and waits for it
		closeTab()
	})
	b := &browser{Context: tab}
	note := func(format string, args ...any) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.problems = append(b.problems, fmt.Sprintf(format, args...))
	}
	chromedp.ListenTarget(tab, func(event any) {
		switch e := event.(type) {
		case *runtime.EventExceptionThrown:
			note("exception: %s", e.ExceptionDetails.Error())
		case *runtime.EventConsoleAPICalled:
			if e.Type == runtime.APITypeError || e.Type == runtime.APITypeWarning {
				note("console: %v", e.Args)
			}
		case *log.EventEntryAdded:
			if e.Entry.Level == log.LevelError || e.Entry.Level == log.LevelWarning {
				note("log: %s %s", e.Entry.Text, e.Entry.URL)
			}
		case *page.EventJavascriptDialogOpening:
			note("dialog: %s", e.Message)
		}
	})
	b.run(t, network.Enable(), log.Enable())
	t.Cleanup(func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		for _, p := range b.problems {
			t.Errorf("the browser says: %s", p)
		}
	})
	return b
}

func (b *browser) run(t *testing.T, actions ...chromedp.Action) {
	t.Helper()
	timer := time.AfterFunc(patience, func() { panic("the browser does not answer") })
	defer timer.Stop()
	if err := chromedp.Run(b, actions...); err != nil {
		t.Fatal(err)
	}
}

// await waits until a JavaScript expression is true. The page may become another one
// meanwhile.
func (b *browser) await(t *testing.T, what, expression string) {
	t.Helper()
	local.Await(t, what, func(context.Context) error {
		var ok bool
		err := chromedp.Run(b, chromedp.Evaluate(expression, &ok))
		if err == nil && !ok {
			var text string
			_ = chromedp.Run(b, chromedp.Evaluate(`document.body.innerText`, &text)) // for the message only
			err = fmt.Errorf("not yet; the page says:\n%s", text)
		}
		return err
	})
}

// evaluate returns the value of a JavaScript expression.
func evaluate[T any](t *testing.T, b *browser, expression string) T {
	t.Helper()
	var v T
	b.run(t, chromedp.Evaluate(expression, &v))
	return v
}

// signIn uses a link.
func (s *site) signIn(t *testing.T, b *browser) {
	t.Helper()
	link := strings.TrimSpace(s.ca.MustCommand(t, "console", "link", "-o", "url"))
	b.run(t, chromedp.Navigate(link), chromedp.Click(`button.main`, chromedp.ByQuery), chromedp.WaitVisible(`nav.pages`, chromedp.ByQuery))
	b.await(t, "the overview", `location.pathname === "/console/"`)
}

// newestRecord is the address of the first record in a list.
const newestRecord = `document.querySelector('td[data-name=Record] a').getAttribute('href')`

// TestPages looks at every page as a desktop and as a phone, light and dark.
func TestPages(t *testing.T) {
	s := start(t)
	b := open(t)
	s.signIn(t, b)
	b.await(t, "the newest record", `!!document.querySelector('td[data-name=Record] a')`)
	visit := func(path string) {
		b.run(t, chromedp.Navigate(s.url+path), chromedp.WaitVisible(`main`, chromedp.ByQuery))
	}
	visit("/console/ledger?identity=" + "spiffe%3A%2F%2Fexample.org%2Fshop%2Fother")
	b.await(t, "the hostile workload's record", `!!document.querySelector('td[data-name=Record] a')`)
	record := evaluate[string](t, b, newestRecord)
	visit("/console/authorities")
	holders := evaluate[string](t, b, `document.querySelector('a[href^="/console/holders?root="]').getAttribute('href')`)
	visit(record)
	b.await(t, "the record in the tree", `document.querySelector("main").innerText.includes("In the tree")`)

	for _, p := range []struct {
		name, path string
		want       []string // in the page's text
	}{
		{"overview", "/console/", []string{"1 of 1", "Certificates in use", "issue", "success", "spiffe://example.org/shop/checkout"}},
		{"nodes", "/console/nodes", []string{"web-1", "connected", "rack=r1", `<img src=x onerror=owned=1>`, `\u202e`}},
		{"identities", "/console/identities", []string{"spiffe://example.org/shop/checkout", "spiffe://example.org/shop/other", "on time"}},
		{"issuance", "/console/issuance?span=1h", []string{"issued", "Refusals and failures by reason"}},
		{"entries", "/console/entries", []string{"me", "operators", "admin", "unused", `unix.uid == 4711`}},
		{"authorities", "/console/authorities", []string{"Root", "Intermediate", "left"}},
		{"holders", holders, []string{"Root", "Intermediates below it", "spiffe://example.org/shop/checkout", "web-1", "current"}},
		{"sign-ins", "/console/ledger?event=sign_in", []string{"sign in", "success", "uid:0", "link from 127.0.0.1:"}},
		{"ledger", "/console/ledger?event=issue&since=1h", []string{"spiffe://example.org/shop/other", "web-1"}},
		{"empty", "/console/ledger?identity=nobody", []string{"No record matches"}},
		{"record", record, []string{"In the tree", "signed checkpoint", `<img src=x onerror=owned=1>`, `\u202e`, "verified by"}},
		{"none", "/console/nothing", []string{"Not found"}},
	} {
		t.Run(p.name, func(t *testing.T) {
			for _, as := range []struct {
				name          string
				width, height int64
				scheme        string
			}{{"desktop-light", 1280, 800, "light"}, {"desktop-dark", 1280, 800, "dark"}, {"phone-light", 360, 740, "light"}, {"phone-dark", 360, 740, "dark"}} {
				b.run(t, emulation.SetDeviceMetricsOverride(as.width, as.height, 1, as.width < 500),
					emulation.SetEmulatedMedia().WithFeatures([]*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: as.scheme}}))
				visit(p.path)
				text := evaluate[string](t, b, `document.querySelector("main").innerText`)
				for _, want := range p.want {
					if !strings.Contains(text, want) {
						t.Errorf("%s: %q is not in:\n%s", as.name, want, text)
					}
				}
				if evaluate[bool](t, b, `"owned" in window`) {
					t.Errorf("%s: what a tenant wrote has acted", as.name)
				}
				if wide := evaluate[[]string](t, b, tooWide); len(wide) > 0 {
					t.Errorf("%s: wider than the screen: %q", as.name, wide)
				}
				if bad := evaluate[[]string](t, b, lowContrast); len(bad) > 0 {
					t.Errorf("%s: contrast below 4.5: %q", as.name, bad)
				}
				picture(t, b, p.name+"-"+as.name)
			}
		})
	}
	b.mu.Lock()
	// The only page that is not there is reported by the browser as such.
	b.problems = slices.DeleteFunc(b.problems, func(p string) bool { return strings.HasSuffix(p, "/console/nothing") })
	b.mu.Unlock()
}

// tooWide lists what makes the page scroll sideways.
const tooWide = `document.documentElement.scrollWidth <= document.documentElement.clientWidth ? [] :
	[document.documentElement.scrollWidth + " of " + document.documentElement.clientWidth].concat(
	[...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
	.slice(0, 8).map(e => e.tagName + "." + e.className + ": " + e.textContent.slice(0, 40)))`

// lowContrast lists text whose contrast is below that of WCAG 2.2 AA for text of
// usual size.
const lowContrast = `(() => {
	const parse = c => (c.match(/[\d.]+/g) || []).map(Number);
	const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
		.reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
	const behind = e => {
		for (; e; e = e.parentElement) {
			const c = parse(getComputedStyle(e).backgroundColor);
			if (c.length === 3 || c[3] > 0.99) return c;
		}
		return [255, 255, 255];
	};
	const found = new Set();
	const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
	for (let n = walk.nextNode(); n; n = walk.nextNode()) {
		const e = n.parentElement;
		if (!n.data.trim() || !e.getClientRects().length || e.closest("svg, option, .unseen, thead, .skip")) continue;
		const a = light(parse(getComputedStyle(e).color)), b = light(behind(e));
		const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
		if (ratio < 4.5) found.add(e.tagName + "." + e.className + " " + ratio.toFixed(2) + ": " + n.data.trim().slice(0, 30));
	}
	return [...found].slice(0, 10);
})()`

// picture keeps a picture of the whole page in the folder MESHID_SCREENSHOTS, for
// people to look at.
func picture(t *testing.T, b *browser, name string) {
	t.Helper()
	dir := os.Getenv("MESHID_SCREENSHOTS")
	if dir == "" {
		return
	}
	var png []byte
	b.run(t, chromedp.FullScreenshot(&png, 100))
	if err := os.WriteFile(filepath.Join(dir, name+".png"), png, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestLive: a page shows a workload that starts while it is looked at, without
// being loaded again, and keeps the focus where it is.
func TestLive(t *testing.T) {
	s := start(t)
	b := open(t)
	s.signIn(t, b)
	b.run(t, chromedp.Navigate(s.url+"/console/identities"), chromedp.WaitVisible(`#live[data-state=live]`, chromedp.ByQuery))
	b.run(t, chromedp.Evaluate(`window.sameDocument = true; document.querySelector('nav.pages a[href$=entries]').focus()`, nil))
	if evaluate[bool](t, b, `document.querySelector("main").innerText.includes("shop/late")`) {
		t.Fatal("the workload is there before it has started")
	}
	s.run(t, "late")
	b.await(t, "the new workload", `document.querySelector("main").innerText.includes("spiffe://example.org/shop/late")`)
	if !evaluate[bool](t, b, `window.sameDocument === true && document.activeElement.getAttribute("href") === "/console/entries"`) {
		t.Error("the page was loaded again, or the focus has moved")
	}

	// Who stops it is not disturbed any more; without a session nothing comes.
	b.run(t, chromedp.Click(`#live`, chromedp.ByQuery), chromedp.WaitVisible(`#live[data-state=paused]`, chromedp.ByQuery))
	b.run(t, chromedp.Click(`form[action="/console/logout"] button`, chromedp.ByQuery))
	b.await(t, "the login", `location.pathname === "/console/login"`)
	b.run(t, chromedp.Navigate(s.url+"/console/nodes"))
	b.await(t, "the login", `location.pathname === "/console/login"`)
}

// TestKeyboard goes through a page with the Tab key alone.
func TestKeyboard(t *testing.T) {
	s := start(t)
	b := open(t)
	s.signIn(t, b)
	b.run(t, chromedp.Navigate(s.url+"/console/nodes"), chromedp.WaitVisible(`#live[data-state=live]`, chromedp.ByQuery))
	// A renewal in between would be no mistake, but another order.
	b.run(t, chromedp.Evaluate(`document.getElementById("live").click(); document.activeElement.blur()`, nil))
	const stop = `(() => { const e = document.activeElement; const s = getComputedStyle(e);
		return { Name: (e.name || e.innerText || e.tagName).trim(), Visible: s.outlineStyle !== "none" && parseFloat(s.outlineWidth) >= 2,
		Order: [...document.querySelectorAll("a[href], button, input, select, summary")].indexOf(e) } })()`
	var names []string
	last := -1
	for range 30 {
		b.run(t, chromedp.KeyEvent(kb.Tab))
		at := evaluate[struct {
			Name    string
			Visible bool
			Order   int
		}](t, b, stop)
		if at.Order < 0 {
			break // behind the last one
		}
		if !at.Visible {
			t.Errorf("the focus on %q is not seen", at.Name)
		}
		if at.Order < last {
			break // around
		}
		if at.Order != last+1 && last >= 0 {
			t.Errorf("from stop %d to %d, %q", last, at.Order, at.Name)
		}
		last = at.Order
		names = append(names, at.Name)
	}
	for _, want := range []string{"Skip to the content", "Overview", "Ledger", "Sign out", "q", "state", "Show", "web-1"} {
		if !slices.Contains(names, want) {
			t.Errorf("the Tab key does not reach %q, but %q", want, names)
		}
	}
	if len(names) == 0 || names[0] != "Skip to the content" {
		t.Errorf("the first stop is not the skip link: %q", names)
	}
	// The skip link goes to the content.
	b.run(t, chromedp.Evaluate(`document.activeElement.blur(); document.querySelector(".skip").focus()`, nil), chromedp.KeyEvent(kb.Enter))
	b.await(t, "the focus in the content", `document.activeElement === document.querySelector("main")`)
}

// TestWithoutScript: all that is there can be read and searched without any script.
func TestWithoutScript(t *testing.T) {
	s := start(t)
	b := open(t)
	b.run(t, emulation.SetScriptExecutionDisabled(true))
	s.signInWithoutScript(t, b)
	for path, want := range map[string]string{
		"/console/identities": "spiffe://example.org/shop/checkout", "/console/nodes": "web-1", "/console/ledger?event=issue": "spiffe://example.org/shop/checkout",
	} {
		b.run(t, chromedp.Navigate(s.url+path))
		var text string
		b.run(t, chromedp.Text(`main`, &text, chromedp.ByQuery))
		if !strings.Contains(text, want) {
			t.Errorf("%s lacks %q:\n%s", path, want, text)
		}
		var shown []string
		b.run(t, chromedp.Evaluate(`[...document.querySelectorAll("#live:not([hidden])")].map(e => e.id)`, &shown))
		if len(shown) > 0 {
			t.Errorf("%s: a button that does nothing is shown", path)
		}
	}
}

func (s *site) signInWithoutScript(t *testing.T, b *browser) {
	t.Helper()
	link, err := s.ca.Command(t, "console", "link", "-o", "url")
	if err != nil {
		t.Fatal(err)
	}
	b.run(t, chromedp.Navigate(strings.TrimSpace(link)), chromedp.Click(`button.main`, chromedp.ByQuery), chromedp.WaitVisible(`nav.pages`, chromedp.ByQuery))
}

// TestLink: a link is for one browser, and the command says what is missing where
// there is no console.
func TestLink(t *testing.T) {
	require.Root(t)
	ca := local.StartCA(t, local.CAOptions{})
	if out, err := ca.Command(t, "console", "link"); err == nil || !strings.Contains(err.Error(), "console.listen") {
		t.Errorf("without a console: %s, %v", out, err)
	}
	if _, err := ca.Admin.GetStatus(t.Context(), &adminv1.GetStatusRequest{}); err != nil {
		t.Error(errors.Join(errors.New("the admin socket"), err))
	}
}
