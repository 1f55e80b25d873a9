"""What lies in a folder: files and DICOM series that may be scans."""
