//go:build pool

package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
)

// TestSanity is the conformance suite of the CSI project; it runs once a process, on the driver that
// LIFEBOAT_CSI_FLAGS asks for.
func TestSanity(t *testing.T) {
	c := sanity.NewTestConfig()
	c.Address = socket
	must(t, os.MkdirAll(filepath.Join(work, "sanity"), 0o750))
	c.TargetPath = filepath.Join(work, "sanity", "target")
	c.StagingPath = filepath.Join(work, "sanity", "staging")
	sanity.Test(t, c)
}
