package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	"github.com/meshid/meshid/test/shop/mesh"
)

// up opens the shop, lets the intruders try, and shows what goes on.
func up(ctx context.Context, m *mesh.Mesh, out io.Writer) error {
	if err := m.Open(ctx); err != nil {
		return err
	}
	if err := m.Intrude(ctx); err != nil {
		return err
	}
	fmt.Fprintf(out, "• the shop is open; look around while it runs:\n"+
		"    bin/ca status --admin-socket %[1]s/ca/admin.sock\n    bin/ca ledger tail --config %[1]s/ca/ca.yaml\n    bin/node-agent status --admin-socket %[1]s/agent/admin.sock\n",
		link)
	console, err := m.Console.CreateLink(ctx, new(adminv1.CreateLinkRequest))
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "• the console, for one browser on this machine, within ten minutes (which warns of the CA's own certificate):\n    %s\n    another link: bin/ca console link --admin-socket %s/ca/admin.sock\n", console.GetUrl(), link)
	every := 10 * time.Second
	if terminal(out) {
		every = time.Second
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	lines := 0
	for {
		view, err := render(ctx, m)
		if err != nil && ctx.Err() == nil {
			return err
		}
		if terminal(out) && lines > 0 {
			fmt.Fprintf(out, "\x1b[%dA\x1b[J", lines) // up to where it began, and clear
		}
		fmt.Fprint(out, view)
		lines = strings.Count(view, "\n")
		select {
		case <-ctx.Done():
			return nil
		case <-m.CA.Ended():
			return fmt.Errorf("the CA ended: %s", m.CA.Tail())
		case <-m.Agent.Ended():
			return fmt.Errorf("the node agent ended: %s", m.Agent.Tail())
		case <-tick.C:
		}
	}
}

func terminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0 && os.Getenv("TERM") != "dumb" && os.Getenv("CI") == ""
}

// render draws the state of the shop: who is who, what is sold, who is refused.
func render(ctx context.Context, m *mesh.Mesh) (string, error) {
	f, err := m.Figures(ctx)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	fmt.Fprintf(&b, "\n%s   trust domain %s\n\n", time.Now().Format(time.TimeOnly), m.TrustDomain)
	t := tabwriter.NewWriter(&b, 2, 0, 3, ' ', 0)
	fmt.Fprintln(t, "  CONTAINER\tIDENTITY\tCERTIFICATE\tLIFE LEFT\tROTATIONS\tHANDSHAKES")
	for _, i := range m.All() {
		c, err := i.Envoy.Certificate(ctx)
		if err != nil {
			return "", err
		}
		traffic, err := i.Envoy.Traffic(ctx)
		if err != nil {
			return "", err
		}
		if c == nil {
			fmt.Fprintf(t, "  %s\t%s\t\t\t\t\n", i.Name, "none: no entry matches it")
			continue
		}
		fmt.Fprintf(t, "  %s\t%s\t%s\t%s\t%d\t%d\n", i.Name, c.ID, shortSerial(c.Serial),
			time.Until(c.NotAfter).Round(time.Second), traffic.Rotations, traffic.Handshakes)
	}
	if err := t.Flush(); err != nil {
		return "", err
	}
	fmt.Fprintf(&b, "\n  requests: %d, failed: %d\n", f.Requests, f.Failures)
	if f.LastError != "" {
		fmt.Fprintf(&b, "  last failure: %s\n", f.LastError)
	}
	return b.String() + intruders(ctx, m), nil
}

func shortSerial(serial string) string {
	if len(serial) > 12 {
		return serial[:12] + "…"
	}
	return serial
}

func intruders(ctx context.Context, m *mesh.Mesh) string {
	var b strings.Builder
	for _, name := range mesh.Intruders {
		for _, i := range m.Instances(name) {
			attempts, err := i.Attempts(ctx)
			if err != nil {
				continue // it has not begun yet
			}
			fmt.Fprintf(&b, "\n  %s:\n", i.Name)
			t := tabwriter.NewWriter(&b, 2, 0, 3, ' ', 0)
			for _, a := range attempts {
				verdict := "refused"
				if a.GotIn > 0 {
					verdict = fmt.Sprintf("GOT IN %d TIMES", a.GotIn)
				}
				fmt.Fprintf(t, "    %s\t%s, %d of %d\t%s\n", a.Name, verdict, a.Tries-a.GotIn, a.Tries, oneLine(a.Refusal))
			}
			_ = t.Flush() // a strings.Builder takes everything
		}
	}
	return b.String()
}

// oneLine shortens what an error says to what fits beside it.
func oneLine(s string) string {
	if i := strings.LastIndex(s, ": "); i >= 0 {
		s = s[i+2:]
	}
	s = strings.Join(strings.Fields(s), " ")
	if len(s) > 60 {
		s = s[:60] + "…"
	}
	return "(" + s + ")"
}
