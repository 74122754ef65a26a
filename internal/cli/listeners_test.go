package cli_test

import (
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/meshid/meshid/internal/cli"
)

// Two listeners are refused if, and only if, the kernel refuses the second.
func TestCheckListeners(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want string // is in the problem; none if ""
	}{
		{":8443", ":8443", `b: ":8443" is taken by a (:8443); write another port in one of them`},
		{":8443", ":8444", ""},
		{":8443", "127.0.0.1:8443", "b: "},
		{"127.0.0.1:8443", "0.0.0.0:8443", "b: "},
		{"[::1]:8443", "0.0.0.0:8443", "b: "},
		{"127.0.0.1:8443", "127.0.0.2:8443", ""},
		{"127.0.0.1:8443", "[::ffff:127.0.0.1]:8443", "b: "},
		{"[::1]:8443", "[0:0:0:0:0:0:0:1]:8443", "b: "},
		{"localhost:8443", "127.0.0.1:8443", "b: "},
		{"LOCALHOST:8443", "localhost:8443", "b: "},
		{"ca.example.org:8443", "CA.example.org:8443", "b: "},
		{":0", ":0", ""},
		{"off", "off", ""},
		{"", "", ""},
		{"8443", "8443", ""}, // no address, which is said elsewhere
		{"/run/meshid/a.sock", "/run/meshid/a.sock", `b: "/run/meshid/a.sock" is taken by a (/run/meshid/a.sock); write another path in one of them`},
		{"/run/meshid/a.sock", "/run/meshid/../meshid//a.sock", "b: "},
		{"/run/meshid/a.sock", "/run/meshid/b.sock", ""},
		{"@meshid", "@meshid", "b: "},
		{"/run/a.sock:8443", ":8443", ""},
	} {
		var got []string
		cli.CheckListeners([]cli.Listener{{"a", c.a}, {"b", c.b}}, func(setting, format string, args ...any) {
			got = append(got, setting+": "+fmt.Sprintf(format, args...))
		})
		if all := strings.Join(got, "\n"); len(got) > 1 || c.want == "" && all != "" || !strings.Contains(all, c.want) {
			t.Errorf("%q and %q: %q, want %q", c.a, c.b, all, c.want)
		}
	}
}

// What the check says of wildcards and families is what the kernel says.
func TestListenersAreTheKernels(t *testing.T) {
	for _, pair := range [][2]string{
		{"127.0.0.1", "0.0.0.0"}, {"127.0.0.1", ""}, {"", "127.0.0.1"}, {"::1", "0.0.0.0"}, {"127.0.0.1", "127.0.0.2"}, {"localhost", "127.0.0.1"}, {"::", "127.0.0.1"},
	} {
		first, err := new(net.ListenConfig).Listen(t.Context(), "tcp", net.JoinHostPort(pair[0], "0"))
		if err != nil {
			t.Logf("%q is not here: %v", pair[0], err)
			continue
		}
		_, port, err := net.SplitHostPort(first.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		second, err := new(net.ListenConfig).Listen(t.Context(), "tcp", net.JoinHostPort(pair[1], port))
		refused := false
		cli.CheckListeners([]cli.Listener{{"a", net.JoinHostPort(pair[0], port)}, {"b", net.JoinHostPort(pair[1], port)}}, func(string, string, ...any) { refused = true })
		if refused != (err != nil) {
			t.Errorf("%q and then %q: refused is %v, and the kernel says %v", pair[0], pair[1], refused, err)
		}
		if err == nil {
			err = second.Close()
		}
		if closeErr := first.Close(); closeErr != nil {
			t.Error(closeErr, err)
		}
	}
}
