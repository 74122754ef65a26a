package main

import (
	"os"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/meshid/meshid/internal/cli"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"node-agent": func() {
			os.Exit(cli.Main(run)) //nolint:forbidigo // this is the main of the program that the scripts call
		},
	})
}

// TestScripts runs testdata/script/*.txtar: what an operator types, and reads.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{Dir: "testdata/script"})
}
