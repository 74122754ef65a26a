// Package cli is what the commands of both programs share: running until a
// signal, the log flags, tables and JSON for people and scripts, errors that end
// with what to do next, and the listeners with health and metrics. It knows no
// command.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"regexp"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Main runs a program until it ends or is told to by SIGINT or SIGTERM, and
// returns the exit code: 0, 1 for an error, or that of an ExitError.
func Main(run func(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	var exit *ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		if exit.Err != nil {
			fmt.Fprintf(os.Stderr, "%s\n", Explain(exit.Err))
		}
		return exit.Code
	default:
		fmt.Fprintf(os.Stderr, "error: %s\n", Explain(err))
		return 1
	}
}

// ExitError ends a program with a code of its own, such as the 1 of a diff that
// found differences. Err may be nil: then nothing is printed.
type ExitError struct {
	Code int
	Err  error
}

// Error implements error.
func (e *ExitError) Error() string {
	if e.Err == nil {
		return fmt.Sprintf("exit code %d", e.Code)
	}
	return e.Err.Error()
}

// Unwrap returns the cause.
func (e *ExitError) Unwrap() error { return e.Err }

// Explain renders an error for a person: a gRPC status without its wrapping,
// with one line for each field that was wrong. What a CA or an agent says in it may
// be what a stranger wrote: it cannot move the cursor.
func Explain(err error) string { return PrintableLines(explain(err)) }

func explain(err error) string {
	answer, ok := errors.AsType[interface {
		error
		GRPCStatus() *status.Status
	}](err)
	if !ok || answer.GRPCStatus().Code() == codes.OK {
		return err.Error()
	}
	s := answer.GRPCStatus()
	var b strings.Builder
	b.WriteString(Plain(strings.ReplaceAll(err.Error(), answer.Error(), s.Message())))
	for _, d := range s.Details() {
		bad, ok := d.(*errdetails.BadRequest)
		if !ok {
			continue
		}
		for _, v := range bad.GetFieldViolations() {
			fmt.Fprintf(&b, "\n  %s: %s", v.GetField(), v.GetDescription())
		}
	}
	switch s.Code() { //nolint:exhaustive // other messages speak for themselves
	case codes.Unavailable:
		if strings.HasSuffix(b.String(), "permission denied") { // by the socket's mode
			b.WriteString(asWhom)
			break
		}
		b.WriteString("\n  Is it running, and is this the right address? See --help for the flag that names it.")
	case codes.PermissionDenied, codes.Unauthenticated:
		b.WriteString(asWhom)
	}
	return b.String()
}

const asWhom = "\n  Run as root (or as the user that the program runs as), or with an identity of an entry that says admin: true."

// What gRPC writes around the cause when it cannot connect, and before an error
// that somebody else has made a text of.
var (
	dialing  = regexp.MustCompile(`connection error: desc = ("transport: (?:Error while dialing: )?(?:[^"\\]|\\.)*")`)
	rpcError = regexp.MustCompile(`rpc error: code = \w+ desc = |latest balancer error: `)
)

// Plain takes gRPC's words out of the text of an error.
func Plain(text string) string {
	text = dialing.ReplaceAllStringFunc(text, func(all string) string {
		cause, err := strconv.Unquote(dialing.FindStringSubmatch(all)[1])
		if err != nil {
			return all
		}
		return strings.TrimPrefix(strings.TrimPrefix(cause, "transport: "), "Error while dialing: ")
	})
	return rpcError.ReplaceAllString(text, "")
}

// Version returns the version that the program was built from.
func Version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	if Release != "" {
		return Release
	}
	if v := info.Main.Version; v != "" && v != "(devel)" {
		return v
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && len(s.Value) >= 12 {
			return "devel-" + s.Value[:12]
		}
	}
	return "devel"
}

// Release is set by the linker in released builds.
var Release string

// LogFlags are the flags that choose what is logged.
type LogFlags struct {
	level  string
	format string
}

// Add adds --log-level and --log-format to a command.
func (l *LogFlags) Add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&l.level, "log-level", "info", "least severe messages to log: debug, info, warn or error")
	cmd.Flags().StringVar(&l.format, "log-format", "text", "form of the log: text or json")
	_ = cmd.RegisterFlagCompletionFunc("log-level", cobra.FixedCompletions([]string{"debug", "info", "warn", "error"}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("log-format", cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp))
}

// Logger returns the logger that the flags ask for, writing to w. If that is a
// pipe whose reader stops, lines are lost and nobody waits.
func (l *LogFlags) Logger(w io.Writer) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(l.level)); err != nil {
		return nil, fmt.Errorf("--log-level %q: write debug, info, warn or error", l.level)
	}
	o := &slog.HandlerOptions{Level: level}
	switch l.format {
	case "text":
		return slog.New(slog.NewTextHandler(unblock(w, textNote), o)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(unblock(w, jsonNote), o)), nil
	default:
		return nil, fmt.Errorf("--log-format %q: write text or json", l.format)
	}
}

// OutputFlag is -o. The first of its formats is the default.
type OutputFlag struct {
	value   string
	formats []string
}

// Add adds -o/--output to a command.
func (o *OutputFlag) Add(cmd *cobra.Command, formats ...string) {
	o.formats = formats
	cmd.Flags().StringVarP(&o.value, "output", "o", formats[0], "output format: "+strings.Join(formats, ", "))
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(formats, cobra.ShellCompDirectiveNoFileComp))
}

// Format returns the format that was asked for.
func (o *OutputFlag) Format() (string, error) {
	for _, f := range o.formats {
		if f == o.value {
			return f, nil
		}
	}
	return "", fmt.Errorf("--output %q: write %s", o.value, strings.Join(o.formats, " or "))
}

// Table writes rows under a header, in columns. A cell is one line, whatever is in it.
func Table(w io.Writer, header []string, rows [][]string) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, strings.Join(header, "\t"))
	for _, r := range rows {
		cells := make([]string, len(r))
		for i, c := range r {
			cells[i] = Printable(c)
		}
		fmt.Fprintln(tw, strings.Join(cells, "\t"))
	}
	return tw.Flush()
}

// Until renders how far t is away from now, as "in 42m" or "3h ago"; "-" for
// the zero time.
func Until(now, t time.Time) string {
	if t.IsZero() || t.Unix() == 0 {
		return "-"
	}
	if d := t.Sub(now); d >= 0 {
		return "in " + Short(d)
	}
	return Short(now.Sub(t)) + " ago"
}

// Short renders a duration in its one or two largest units.
func Short(d time.Duration) string {
	const day = 24 * time.Hour
	switch {
	case d < time.Second:
		return d.Round(time.Millisecond).String()
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return two(int(d.Minutes()), "m", int(d.Seconds())%60, "s", d < 10*time.Minute)
	case d < 2*day:
		return two(int(d.Hours()), "h", int(d.Minutes())%60, "m", true)
	case d < 730*day:
		return two(int(d/day), "d", int(d.Hours())%24, "h", d < 10*day)
	default:
		return fmt.Sprintf("%dy", int(d/(365*day)))
	}
}

func two(a int, unitA string, b int, unitB string, both bool) string {
	if b == 0 || !both {
		return fmt.Sprintf("%d%s", a, unitA)
	}
	return fmt.Sprintf("%d%s%d%s", a, unitA, b, unitB)
}

// Colours for Paint.
const (
	Red    = "\x1b[31m"
	Green  = "\x1b[32m"
	Yellow = "\x1b[33m"
	Bold   = "\x1b[1m"
	reset  = "\x1b[0m"
)

// Paint colours text if w is a terminal and NO_COLOR is not set.
func Paint(w io.Writer, colour, text string) string {
	if !Terminal(w) || os.Getenv("NO_COLOR") != "" {
		return text
	}
	return colour + text + reset
}

// Terminal says whether a person reads what is written to w.
func Terminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	st, err := f.Stat()
	return err == nil && st.Mode()&os.ModeCharDevice != 0
}
