// Command coverage prints docs/coverage.md: which known failures and which
// requirements are shown by which tests. It looks at names only; whether the
// tests pass is `go test`'s business.
package main

import (
	"fmt"
	"os"

	"github.com/meshid/meshid/test/house"
)

func main() {
	files, err := house.Parse(".")
	if err == nil {
		err = house.WriteCoverage(os.Stdout, house.Cases(files))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "coverage:", err)
		os.Exit(1) //nolint:forbidigo // this is main
	}
}
